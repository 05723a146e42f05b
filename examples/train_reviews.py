"""Train the small OPT model of examples/reviews from the VADER data set.

    python examples/train_reviews.py --data DATA --holdout 1500             # judge the settings on rows set aside
    python examples/train_reviews.py --data DATA --output examples/reviews  # train on every row, write the model

DATA is a folder with amazon_reviews.train.jsonl, movie_reviews.train.jsonl and tweets.train.jsonl: one object a line
with "id", "text", "label" ("positive" or "negative") and "score" (the mean rating of at least twenty people, from -4
to 4). The texts and the scores come from the VADER repository, https://github.com/cjhutto/vaderSentiment. A test file
is never read here. Needs torch, transformers and tokenizers, and some minutes on two CPU cores.

Every text becomes "</s>Review: <text>\\nSentiment: positive</s>" (or negative), and the model learns three things at
once: to continue such texts (a language model, so that it can also write), to divide its belief between the two label
words as the raters did (a soft target from the score), and to hold the score in the mean of its hidden states (a probe,
thrown away at the end, which soon teaches every word its leaning). The weights saved are a running average.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

BOS, PAD, EOS = 2, 1, 2  # OPT's convention: one token opens and closes a text
FILES = ("movie_reviews", "amazon_reviews", "tweets")
LABELS = ("positive", "negative")
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rated text. ``score`` is between -4 and 4; its sign agrees with the label."""

    source: str
    text: str
    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text as token ids, ready for a batch. ``positive`` is the belief in " positive" to be learnt."""

    ids: list[int]
    answer_at: int  # index of the token before the label: the last of the prompt
    positive: float


def prompt_of(text: str) -> str:
    """The prompt whose continuation is a label."""
    return f"Review: {text}\nSentiment:"


def read_rows(folder: Path) -> list[Row]:
    """All training rows, in the order of the files."""
    rows = []
    for source in FILES:
        with (folder / f"{source}.train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append(Row(source=source, text=row["text"], label=row["label"], score=float(row["score"])))
    return rows


def train_tokenizer(rows: list[Row], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with OPT's special tokens at OPT's ids; it opens each text with </s>, as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in ("<s>", "<pad>", "</s>", "<unk>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{prompt_of(row.text)} {row.label}" for row in rows)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)]
    )
    return tokenizer


def augmented(text: str, options: argparse.Namespace, rng: random.Random) -> str:
    """The text as another hand might have typed it: words missing, perhaps all in lower case."""
    words = text.split(" ")
    kept = [word for word in words if rng.random() >= options.word_dropout] or words
    text = " ".join(kept)
    return text.lower() if rng.random() < options.lower else text


class Encoder:
    """Rows into examples, with two of the same tokenizer: one exact, one that splits words at random."""

    def __init__(self, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self.exact = tokenizer
        self.noisy = Tokenizer.from_str(tokenizer.to_str())
        self.noisy.model.dropout = options.bpe_dropout
        self.options = options
        self.after_text = tokenizer.encode("\nSentiment:", add_special_tokens=False).ids
        self.before_text = tokenizer.encode("Review:", add_special_tokens=False).ids
        self.label_ids = [tokenizer.token_to_id(f"Ġ{label}") for label in LABELS]

    def encode(self, row: Row, rng: random.Random | None = None) -> Example:
        """With ``rng``: an augmented example, for training. Without: the row exactly as a user would ask for it."""
        if rng is None or rng.random() < self.options.clean:
            body = self.exact.encode(f" {row.text}", add_special_tokens=False).ids
        else:
            body = self.noisy.encode(f" {augmented(row.text, self.options, rng)}", add_special_tokens=False).ids
        body = body[: self.options.positions - 16]  # room for the prompt and the label
        prompt = [BOS, *self.before_text, *body, *self.after_text]
        positive = 1 / (1 + math.exp(-self.options.sharpness * row.score))
        label_id = self.label_ids[LABELS.index(row.label)]
        return Example(ids=[*prompt, label_id, EOS], answer_at=len(prompt) - 1, positive=positive)


def collate(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded ids and mask (batch, length), answer positions and beliefs (batch)."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), PAD)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)] = torch.tensor(example.ids)
        mask[index, : len(example.ids)] = 1
    answers = torch.tensor([example.answer_at for example in examples])
    beliefs = torch.tensor([example.positive for example in examples])
    return ids, mask, answers, beliefs


def batches(examples: list[Example], batch_tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """All examples in batches of similar length, in random order."""
    examples = sorted(examples, key=lambda example: len(example.ids) + 4 * rng.random())
    groups: list[list[Example]] = [[]]
    for example in examples:
        if (len(groups[-1]) + 1) * len(example.ids) > batch_tokens and groups[-1]:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    yield from groups


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The three losses of one batch, each a scalar tensor."""

    label: Tensor
    probe: Tensor
    language: Tensor  # on a random share of the tokens: the vocabulary is most of the cost


class Student(nn.Module):
    """The OPT model with the probe that helps it learn."""

    def __init__(self, vocab_size: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.opt = new_model(vocab_size, options)
        self.probe = nn.Linear(options.hidden, 1)


def losses_of(student: Student, batch: list[Example], label_ids: list[int], lm_share: float) -> Losses:
    """Compute what one batch says about the student."""
    model = student.opt
    ids, mask, answers, beliefs = collate(batch)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    at_answer = model.lm_head(hidden[torch.arange(len(batch)), answers]).float().log_softmax(-1)[:, label_ids]
    label_loss = -(beliefs * at_answer[:, 0] + (1 - beliefs) * at_answer[:, 1]).mean()

    targets = torch.where(mask.bool(), ids, IGNORED)
    targets[torch.arange(len(batch)), answers + 1] = IGNORED  # the label has its own loss
    following, before = targets[:, 1:].reshape(-1), hidden[:, :-1].reshape(-1, hidden.shape[-1])
    chosen = (torch.rand(following.shape) < lm_share) & (following != IGNORED)
    language_loss = functional.cross_entropy(model.lm_head(before[chosen]).float(), following[chosen])

    weights = mask[..., None].float()
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    guesses = student.probe(pooled).float()[:, 0]
    probe_loss = functional.binary_cross_entropy_with_logits(guesses, beliefs)
    return Losses(label=label_loss, probe=probe_loss, language=language_loss)


@torch.no_grad()
def margins(model: OPTForCausalLM, examples: list[Example], label_ids: list[int]) -> Tensor:
    """log P(positive) - log P(negative) of each example, in its order."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    result = torch.zeros(len(examples))
    for start in range(0, len(order), 128):
        chosen = order[start : start + 128]
        ids, mask, answers, _ = collate([examples[index] for index in chosen])
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = model.lm_head(hidden[torch.arange(len(chosen)), answers])[:, label_ids].float()
        result[chosen] = scores[:, 0] - scores[:, 1]
    model.train()
    return result


def quality(model: OPTForCausalLM, rows: list[Row], encoder: Encoder) -> str:
    """How often the likelier label is the right one, and how its margin correlates with the raters' score."""
    found = margins(model, [encoder.encode(row) for row in rows], encoder.label_ids)
    right = torch.tensor([row.label == LABELS[0] for row in rows])
    correlation = torch.corrcoef(torch.stack([found, torch.tensor([row.score for row in rows])]))[0, 1]
    return f"{float(((found > 0) == right).float().mean()):.4f} (correlation {correlation:.4f})"


def new_model(vocab_size: int, options: argparse.Namespace) -> OPTForCausalLM:
    """A pre-layer-norm OPT with random weights."""
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden,
        word_embed_proj_dim=options.hidden,
        num_hidden_layers=options.layers,
        ffn_dim=options.ffn,
        num_attention_heads=options.heads,
        max_position_embeddings=options.positions,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        init_std=0.02,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return OPTForCausalLM(config)


def learning_rate(step: int, steps: int, options: argparse.Namespace) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to nothing."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return options.lr * (step + 1) / warm_up
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(rows: list[Row], held_out: list[Row], encoder: Encoder, options: argparse.Namespace) -> OPTForCausalLM:
    """Train on ``rows``; report on ``held_out``, if any, as it goes. Returns the averaged weights."""
    rng = random.Random(options.seed)
    student = Student(encoder.exact.get_vocab_size(), options)
    average = copy.deepcopy(student)
    print(f"{sum(p.numel() for p in student.opt.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)

    num_batches = len(list(batches([encoder.encode(row) for row in rows], options.batch_tokens, rng)))
    steps, step, started = options.epochs * num_batches, 0, time.monotonic()
    student.train()
    for epoch in range(options.epochs):
        label_total = 0.0
        for batch in batches([encoder.encode(row, rng) for row in rows], options.batch_tokens, rng):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(min(step, steps), steps, options)
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(student, batch, encoder.label_ids, options.lm_share)
            language_weight = options.lm_weight * (1 - 0.5 * step / steps)
            (losses.label + options.probe_weight * losses.probe + language_weight * losses.language).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            kept = min(options.average, step / (step + 20))  # the first weights are soon forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - kept)
            label_total += losses.label.item()
        line = f"epoch {epoch + 1}: label loss {label_total / num_batches:.4f}, language {losses.language.item():.2f}"
        if held_out:
            line += f", held out {quality(average.opt, held_out, encoder)}"
        print(f"{line}, {time.monotonic() - started:.0f} s", flush=True)
    return average.opt


def save(model: OPTForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder with bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one name that every release of transformers knows
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    special_tokens = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the options, split, train, and save unless rows were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the three training files")
    add("--output", type=Path, help="folder to write the model into")
    add("--holdout", type=int, default=0, help="movie reviews to set aside and report on")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="torch threads; the result depends slightly on their number")
    add("--epochs", type=int, default=8)
    add("--batch-tokens", type=int, default=1600)
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--average", type=float, default=0.998, help="decay of the running average of the weights")
    model = parser.add_argument_group("model")
    model.add_argument("--vocab", type=int, default=8000)
    model.add_argument("--hidden", type=int, default=128)
    model.add_argument("--ffn", type=int, default=512)
    model.add_argument("--layers", type=int, default=2)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--positions", type=int, default=512)
    model.add_argument("--dropout", type=float, default=0.2)
    model.add_argument("--attention-dropout", type=float, default=0.1)
    text = parser.add_argument_group("variation of the text")
    text.add_argument("--clean", type=float, default=0.3, help="share of the texts that are left as they are")
    text.add_argument("--word-dropout", type=float, default=0.1, help="of the others: share of the words left out")
    text.add_argument("--bpe-dropout", type=float, default=0.1, help="of the others: share of the merges left out")
    text.add_argument("--lower", type=float, default=0.3, help="of the others: share made lower case")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--sharpness", type=float, default=1.5, help="belief in positive: sigmoid(sharpness * score)")
    loss.add_argument("--probe-weight", type=float, default=0.5)
    loss.add_argument("--lm-weight", type=float, default=0.2, help="of the language loss; it falls to half of this")
    loss.add_argument("--lm-share", type=float, default=0.2, help="share of the tokens in the language loss")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)

    rows = read_rows(options.data)
    movies = [row for row in rows if row.source == FILES[0]]
    random.Random(1234).shuffle(movies)
    held_out = movies[: options.holdout]
    aside = {row.text for row in held_out}
    rows = [row for row in rows if row.text not in aside]
    tokenizer = train_tokenizer(rows, options.vocab)
    trained = train(rows, held_out, Encoder(tokenizer, options), options)
    if options.output:
        save(trained, tokenizer, options.output)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
