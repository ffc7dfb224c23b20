"""The generated schemas are about the versions that are installed."""

import dataclasses

from recipe_runner.methods import METHODS, REFUSED
from recipe_runner.recipe import schema
from recipe_runner.recipe.library import shelf
from recipe_runner.stages import STAGES, load_class


def test_every_field_of_upstream_is_there_and_nothing_else():
    classes = {stage.config.split(":")[1]: load_class(stage.config) for stage in STAGES.values()}
    expected = [
        *((name.replace("Config", "_config").lower(), cls, {"peft_optimizer"}) for name, cls in classes.items()),
        *((f"{name}_config", load_class(method.config), {"method"}) for name, method in METHODS.items()),
    ]
    others = {"bitsandbytes_config", "accelerate_config"}
    files = {file.name.split(".")[0] for file in (shelf() / "schema" / "upstream").glob("*.schema.json")}
    assert files == {name for name, _, _ in expected} | others
    for name, cls, ours in expected:
        fields = {field.name for field in dataclasses.fields(cls) if field.init}
        assert set(schema.load(f"upstream/{name}.schema.json")["properties"]) == fields | ours


def test_every_method_of_peft_is_known_or_refused_with_a_reason():
    """Fails for a method that a new version of PEFT brings, and when a refused one is gone."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    registry = {getattr(name, "value", name).lower(): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert set(registry) | {"bottleneck"} == set(METHODS) | set(REFUSED)
    assert not set(METHODS) & set(REFUSED)
    for name, method in METHODS.items():
        assert name == "bottleneck" or load_class(method.config) is registry[name]
    assert all(len(reason) > 20 for reason in REFUSED.values())


def test_what_is_said_of_quantized_bases_is_what_peft_has_layers_for():
    import importlib.util

    linear = {name: method for name, method in METHODS.items() if method.kind == "linear"}
    able = {name for name in linear if importlib.util.find_spec(f"peft.tuners.{name}.bnb")}
    assert able == {name for name, method in linear.items() if method.quantized}
