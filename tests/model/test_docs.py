"""The Python that the pages show runs."""

import re

from conftest import ROOT


def test_the_python_that_is_shown_loads_an_adapter(tiny_phi3, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_phi3), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_phi3).save_pretrained(tmp_path)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    (code,) = [code for page in pages for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    code, changes = re.subn(r'^folder = ".*"', f'folder = "{tmp_path}"', code, flags=re.MULTILINE)
    assert changes == 1
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
