"""The Python that the pages show runs."""

import re

import pytest
from conftest import ROOT

PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_python_that_is_shown_loads_an_adapter(page, tiny_phi3, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipe_runner.model.bottleneck import BottleneckConfig

    base = AutoModelForCausalLM.from_pretrained(tiny_phi3)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    adapted = get_peft_model(base, config if page == "README.md" else BottleneckConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_phi3).save_pretrained(tmp_path)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {str(found.relative_to(ROOT)): PYTHON.findall(found.read_text()) for found in pages}
    assert {name for name, codes in shown.items() if codes} == {"README.md", "docs/methods.md"}
    (code,) = shown[page]
    code, changes = re.subn(r'^folder = ".*"', f'folder = "{tmp_path}"', code, flags=re.MULTILINE)
    assert changes == 1
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    if "output" in code:
        assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
