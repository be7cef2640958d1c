"""Scores of a trained model on held-out examples, through nano-inference or transformers.

    python -m training.evaluate MODEL --backend engine --backend transformers --draft DRAFT

Skills are scored greedily, on prompts that training never saw (see skills.held_out). An answer is
right if it is the right answer, letter for letter (JSON: the same value).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from . import skills, stories
from .data import Writer
from .tokenizer import ASSISTANT, BOS, CONTEXT, END, USER

GREEDY_TOKENS = 96  # the longest right answer has fewer
STORY_TOKENS = 700
OPENING = "Once upon a time"


class Backend(Protocol):
    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[str]: ...
    def sampled(self, prompts: list[list[int]], max_tokens: int) -> list[str]: ...
    def nll(self, texts: list[list[int]]) -> float: ...


class Engine:
    """nano-inference on the CPU."""

    def __init__(self, model: str, **options: Any) -> None:
        from nano_inference import LLM

        self.llm = LLM(model, seed=0, **options)

    def _run(self, prompts: list[list[int]], **params: Any) -> list[str]:
        """With a seed for each: the same prompt and seed would be the same text."""
        from nano_inference import SamplingParams

        each = [SamplingParams(seed=i, **params) for i in range(len(prompts))]
        outputs = self.llm.generate(prompts, each, use_tqdm=False)
        return [o.outputs[0].text for o in outputs]

    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        return self._run(prompts, temperature=0, max_tokens=max_tokens)

    def sampled(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        return self._run(prompts, temperature=0.7, top_p=0.95, max_tokens=max_tokens)

    def nll(self, texts: list[list[int]]) -> float:
        """Mean negative log-likelihood of all tokens but the first of each text."""
        from nano_inference import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        total, count = 0.0, 0
        for output in self.llm.generate(texts, params, use_tqdm=False):
            for token, entry in zip(
                output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True
            ):
                assert entry is not None
                total -= entry[token].logprob
                count += 1
        return total / count


class Transformers:
    """transformers, on whatever device there is."""

    def __init__(self, model: str, rows: int = 64) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.model = loaded.to(self.device).eval()
        self.rows = rows if self.device == "cpu" else 512

    def _run(self, prompts: list[list[int]], max_tokens: int, **how: Any) -> list[str]:
        import torch

        torch.manual_seed(0)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out = [""] * len(prompts)
        for at in range(0, len(order), self.rows):
            some = order[at : at + self.rows]
            width = max(len(prompts[i]) for i in some)
            pad = self.tokenizer.pad_token_id
            ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in some]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some]
            made = self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=max_tokens,
                **how,
            )
            for i, row in zip(some, made[:, width:].tolist(), strict=True):
                out[i] = self.tokenizer.decode(row, skip_special_tokens=True)
        return out

    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        return self._run(
            prompts, max_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )

    def sampled(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        return self._run(prompts, max_tokens, do_sample=True, temperature=0.7, top_p=0.95, top_k=0)

    def nll(self, texts: list[list[int]]) -> float:
        import torch

        total, count = 0.0, 0
        for ids in texts:
            row = torch.tensor([ids], device=self.device)
            with torch.no_grad():
                scores = self.model(row).logits[0, :-1].float().log_softmax(-1)
            total -= scores.gather(1, row[0, 1:, None]).sum().item()
            count += len(ids) - 1
        return total / count

    def likeliest(self, ids: list[int]) -> list[int]:
        """The greedy next token after each position."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([ids], device=self.device)).logits
        return list(logits[0].argmax(-1).tolist())


# -- What is asked --------------------------------------------------------------------------------


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As the chat template puts it."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return [BOS, USER, *ids, END, ASSISTANT]


def questions(tokenizer: Tokenizer, count: int) -> dict[str, list[skills.Example]]:
    """`count` held-out examples of each skill, all different; the same ones every time."""
    writer = Writer(tokenizer, "evaluation", test=True)
    makers: dict[str, Callable[[random.Random], skills.Example]] = {}
    for skill in skills.SKILLS:
        makers[skill] = partial(skills.sample, skill, test=True)
    for distance in (100, 900, CONTEXT - 250):
        makers[f"retrieval at {distance}"] = partial(
            skills.retrieval, count=writer.count, distance=distance, sentences=writer.sentences
        )
    out = {}
    for name, make in makers.items():
        rng = random.Random(f"evaluation {name}")
        found: dict[str, skills.Example] = {}
        while len(found) < count:
            example = make(rng)
            found.setdefault(example.prompt, example)
        out[name] = list(found.values())
    return out


def score_skills(
    backend: Backend, tokenizer: Tokenizer, count: int, only: list[str] | None = None
) -> dict[str, dict[str, Any]]:
    out = {}
    for name, examples in questions(tokenizer, count).items():
        if only and name not in only:
            continue
        prompts = [chat_ids(tokenizer, e.prompt) for e in examples]
        answers = backend.greedy(prompts, GREEDY_TOKENS)
        right = [
            skills.is_right(name, e, answer)
            for e, answer in zip(examples, answers, strict=True)
        ]  # fmt: skip
        wrong = [
            {"prompt": e.prompt[-120:], "right": e.answer, "said": answer[:200]}
            for e, answer, ok in zip(examples, answers, right, strict=True)
            if not ok
        ]
        out[name] = {
            "right": sum(right),
            "of": len(right),
            "percent": round(100 * sum(right) / len(right), 2),
            "wrong": wrong[:3],
        }
    return out


def score_stories(backend: Backend, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Perplexity of held-out stories; how many of the model's own are consistent.

    `greedy`: half go on from the first sentence of a held-out story, half are asked for in a chat;
    `sampled`: all go on from OPENING, with temperature 0.7 and top_p 0.95.
    """
    writer = Writer(tokenizer, "evaluation stories", test=True)
    texts = [writer.story().text for _ in range(count)]
    held = [[BOS, *writer.encode(text), END] for text in texts]
    starts = [text.split(". ")[0] + "." for text in texts[: count // 2]]
    wishes = [stories.story_request(writer.rng)[0] for _ in range(count - len(starts))]
    prompts = [[BOS, *writer.encode(start)] for start in starts]
    prompts += [chat_ids(tokenizer, wish) for wish in wishes]
    told = backend.greedy(prompts, STORY_TOKENS)
    greedy = [a + b for a, b in zip(starts + [""] * len(wishes), told, strict=True)]
    drawn = backend.sampled([[BOS, *writer.encode(OPENING)]] * count, STORY_TOKENS)
    sampled = [OPENING + text for text in drawn]

    def consistent(made: list[str]) -> dict[str, Any]:
        faults = [fault[0] for text in made if (fault := stories.check_story(text))]
        right = len(made) - len(faults)
        percent = round(100 * right / len(made), 2)
        return {"right": right, "of": len(made), "percent": percent, "faults": faults[:10]}

    return {
        "perplexity": round(math.exp(backend.nll(held)), 3),
        "greedy": consistent(greedy),
        "sampled": consistent(sampled),
        "sample": sampled[0],
    }


def agreement(main: Transformers, draft: Transformers, tokenizer: Tokenizer, rows: int) -> float:
    """Share of held-out positions (stories and answers) at which the draft's greedy next token is
    the main model's, in percent."""
    from .data import LEARN

    writer = Writer(tokenizer, "evaluation draft", test=True)
    same = count = 0
    for i in range(rows):
        row = writer.row((128, 512, 512, CONTEXT)[i % 4])
        ids = (row & (LEARN - 1)).astype(int).tolist()
        learn = ((row & LEARN) != 0).tolist()
        ours, theirs = main.likeliest(ids), draft.likeliest(ids)
        for at in range(len(ids) - 1):
            if learn[at + 1]:
                same += ours[at] == theirs[at]
                count += 1
    return round(100 * same / count, 2)


def evaluate(model: Path, backend: Backend, count: int) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    begin = time.perf_counter()
    found = {
        "skills": score_skills(backend, tokenizer, count),
        "stories": score_stories(backend, tokenizer, min(count, 500)),
    }
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a skill, a column a backend."""
    names = [n for n in ("engine", "transformers") if n in results]
    lines = ["| held-out | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for skill in results[names[0]]["skills"]:
        cells = [f"{results[n]['skills'][skill]['percent']:.1f}%" for n in names]
        lines.append(f"| {skill} | " + " | ".join(cells) + " |")
    told = [results[n]["stories"] for n in names]
    lines.append("| story perplexity | " + " | ".join(f"{s['perplexity']}" for s in told) + " |")
    for how in ("greedy", "sampled"):
        cells = [f"{s[how]['percent']:.1f}%" for s in told]
        lines.append(f"| {how} stories without a fault | " + " | ".join(cells) + " |")
    if "draft_agreement" in results:
        share = results["draft_agreement"]
        lines.append(f"\nThe draft model says {share}% of the main model's greedy next tokens.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", action="append", choices=("engine", "transformers"))
    parser.add_argument("--draft", type=Path, help="also: how often it agrees with the model")
    parser.add_argument("--count", type=int, default=500, help="prompts a skill")
    parser.add_argument("--save", type=Path, help="write all of it as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {"count": args.count}
    for name in args.backend or ["engine"]:
        backend: Backend = (Engine if name == "engine" else Transformers)(str(args.model))
        results[name] = evaluate(args.model, backend, args.count)
    if args.draft:
        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        pair = Transformers(str(args.model)), Transformers(str(args.draft))
        results["draft_agreement"] = agreement(*pair, tokenizer, 200)
    print(table(results))
    if args.save:
        args.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
