"""The generated schemas are about the versions that are installed."""

import dataclasses

from recipe_runner.recipe import schema
from recipe_runner.recipe.library import shelf
from recipe_runner.stages import STAGES, load_class


def test_every_field_of_upstream_is_there_and_nothing_else():
    from peft import LoraConfig

    classes = {stage.config.split(":")[1]: load_class(stage.config) for stage in STAGES.values()}
    assert len(classes) == len(list((shelf() / "schema" / "upstream").glob("*_config.schema.json"))) - 3
    for name, cls, ours in (
        *((name.replace("Config", "_config").lower(), cls, set()) for name, cls in classes.items()),
        ("lora_config", LoraConfig, {"method"}),
    ):
        fields = {field.name for field in dataclasses.fields(cls) if field.init}
        assert set(schema.load(f"upstream/{name}.schema.json")["properties"]) == fields | ours
