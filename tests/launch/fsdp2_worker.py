"""Trains three steps of LoRA on a tiny Phi-3, sharded by torch's own FSDP2 over the processes of a launch (gloo).

    torchrun --nproc-per-node 2 tests/fsdp2_worker.py MODEL RESULT.json

accelerate 1.15 does not start FSDP2 without an accelerator; this drives what it would call (`fully_shard` on each
decoder layer, then on the model), with our adapter, and says what a process holds.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

ROWS, STEPS = 4, 3


def main(folder, result):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    whole = sum(parameter.numel() for parameter in model.parameters())
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    local = sum((p.to_local() if size > 1 else p).numel() for p in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = torch.randint(5, 500, (ROWS, 16), generator=torch.Generator().manual_seed(1))
    mine = batch[rank::size]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / size)
    if rank == 0:
        Path(result).write_text(json.dumps({"losses": losses, "share": local / whole}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
