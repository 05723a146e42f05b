"""The peers, timed: transformers' ``generate``, with the model in memory or offloaded by accelerate.

Each gets its best settings: SDPA attention, bfloat16 (or what was asked), left padding as its documentation advises,
and no work that the comparison does not need (no tokenizer, no stop criterion but the length).
"""

import importlib
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.jobs import Job
from benchmarks.shapes import PAD
from benchmarks.workload import Item

PEERS = ("transformers", "accelerate")


def run(job: Job) -> dict[str, Any]:
    """Seconds for all requests in batches of ``job.batch``, in the order in which they come."""
    model = _load(job)
    model.eval()
    items = job.items()
    warm_up = [Item(item.prompt, item.continuation[:2]) for item in items[: job.batch]]
    tokens: list[list[int]] = []
    with torch.inference_mode():
        _batch(job, model, warm_up)
        start = perf_counter()
        for first in range(0, len(items), job.batch):
            tokens += _batch(job, model, items[first : first + job.batch])
        if job.device != "cpu":
            torch.cuda.synchronize()
        seconds = perf_counter() - start
    result: dict[str, Any] = {
        "seconds": seconds,
        "began": start,
        "num_tokens": sum(len(item.continuation) for item in items),
    }
    if job.keep_tokens:
        result["tokens"] = tokens
    return result


def _load(job: Job) -> Any:
    """The model where ``job.weights`` says; for transformers alone that can only be the device's memory."""
    # Imported by name: these libraries' annotations are not ours to check.
    transformers: Any = importlib.import_module("transformers")
    dtype = getattr(torch, job.dtype)
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if job.role == "accelerate":
        importlib.import_module("accelerate")
        layers = {"device": job.device, "host": "cpu", "disk": "disk", "planned": "disk"}[job.weights]
        decoder = "model.decoder"
        arguments["device_map"] = {
            f"{decoder}.embed_tokens": job.device,
            f"{decoder}.embed_positions": job.device,
            f"{decoder}.layers": layers,
            f"{decoder}.final_layer_norm": job.device,
            "lm_head": job.device,
        }
        if layers == "disk":
            # What is safetensors already is read where it lies; nothing is written here.
            arguments["offload_folder"] = str(Path(job.folder).parent / "offload")
    model = transformers.AutoModelForCausalLM.from_pretrained(job.folder, **arguments)
    return model if job.role == "accelerate" else model.to(job.device)


def _batch(job: Job, model: Any, items: list[Item]) -> list[list[int]]:
    if job.workload.task == "score":
        return _score(job, model, items)
    longest = max(len(item.prompt) for item in items)
    ids, mask = _padded([item.prompt for item in items], longest, job.device)
    num_new = max(len(item.continuation) for item in items)
    # A length of its own for each row is not to be had: a batch runs until its last row is done.
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=PAD
    )
    return [row[longest : longest + len(item.continuation)] for row, item in zip(out.tolist(), items, strict=True)]


def _score(job: Job, model: Any, items: list[Item]) -> list[list[int]]:
    rows = max(len(item.continuation) for item in items)
    whole = [item.prompt + item.continuation for item in items]
    ids, mask = _padded(whole, max(map(len, whole)), job.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=rows + 1
    ).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, -rows:, None])
    assert logprobs.isfinite().all()
    return [list(item.continuation) for item in items]


def _padded(rows: list[tuple[int, ...]], longest: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
