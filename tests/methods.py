"""Adapters and quantizations that the tests train with."""

LORA = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
