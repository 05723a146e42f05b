"""Commands that several claims share the form of."""


def generate(shape: str, requests: int, prompt: str, out: str, *more: str) -> tuple[str, ...]:
    """``benchmarks.generate``: some requests of a model, with prompts and outputs of these lengths."""
    words = ("--shape", shape, "--requests", str(requests), "--prompt-len", prompt, "--gen-len", out)
    return ("benchmarks.generate", *words, *more, "--json")
