"""One model on several GPUs: its heads divided (tensor parallelism), or its prompts (context parallelism).

    torchrun --nproc-per-node 2 examples/several_gpus.py --way tp
    torchrun --nproc-per-node 2 examples/several_gpus.py --way cp --model FOLDER

Without GPUs the processes talk through gloo. The bundled model has 2 KV heads, so that 2 processes can share it by its heads.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sparsify

MODEL = Path(__file__).parents[1] / "benchmarks" / "models" / "demo"
TEXT = "\n## harbor: 271828\n" + "lorem ipsum dolor sit amet " * 40 + "\n?? harbor: "


def load(folder: Path, way: str, device: torch.device) -> Any:
    """The model, compiled so that all processes share it."""
    settings: dict[str, Any] = {"dtype": torch.float32 if device.type == "cpu" else torch.bfloat16}
    lower = {"lower": "eager" if device.type == "cpu" else "inductor"}  # eager: no time to compile
    if way == "tp":  # each process reads its part of the weights; needs the package accelerate
        settings["distributed_config"] = DistributedConfig(tp_plan="auto")
        return sparsify.compile(AutoModelForCausalLM.from_pretrained(folder, **settings).eval(), **lower)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **settings).to(device).eval()
    return sparsify.compile(model, mesh=mesh, **lower)


def main(arguments: list[str] | None = None) -> str:
    """Prints and returns what the model answers, the same in all processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=["tp", "cp"], default="cp")
    parser.add_argument("--model", type=Path, default=MODEL)
    given = parser.parse_args(arguments)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=5))
    model = load(given.model, given.way, device)
    prompt = torch.tensor([list(TEXT.encode())], device=device)  # this model's tokens are bytes
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
    answer = bytes(said[0, prompt.shape[1] :].tolist()).decode("latin-1")
    print(f"process {dist.get_rank()} of {dist.get_world_size()}: {answer}")
    return answer


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
