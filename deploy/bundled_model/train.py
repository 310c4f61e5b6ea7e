"""Trains the bundled model from nothing but the exercises and stories of this folder, on the CPU.

    python deploy/bundled_model/train.py --out shared/pagebus/bundled --minutes 60

The learning rate falls to zero at the end of `--minutes`, so the figure decides how good the model gets. `--resume`
starts from an earlier model's folder and keeps its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from batches import batches
from evaluate import score
from exercises import SKILLS, draw_chat, draw_text, stories
from network import Network, Shape, config_of, exported
from safetensors.torch import load_file, save_file
from tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "model.safetensors")


def new_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer of the exercises themselves."""
    rng = random.Random(0)
    lines: list[str] = []
    for _ in range(20_000):
        chat, text = draw_chat(rng), draw_text(rng)
        lines += [line for turn in chat.turns for line in (turn.question, turn.answer)]
        lines += [chat.system or "", text.prompt + text.continuation, "system\n", "user\n", "assistant\n"]
    return train_tokenizer(lines, vocab)


def save(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model as a Hugging Face directory; each file replaces its old one at once."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)
    with TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        save_tokenizer(tokenizer, scratch)
        config = config_of(network.shape, [end, pad], pad)
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False}
        (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_file(exported(network), scratch / "model.safetensors", metadata={"format": "pt"})
        for file in FILES:
            os.replace(scratch / file, folder / file)


def check(network: Network, folder: Path) -> None:
    """The saved model is the trained one: transformers' logits agree with ours on the rounded weights."""
    from transformers import AutoModelForCausalLM

    twin = Network(network.shape)
    twin.load_state_dict({name: value.bfloat16().float() for name, value in network.state_dict().items()})
    ids = torch.randint(0, network.shape.vocab, (2, 50))
    with torch.inference_mode():
        ours = torch.nn.functional.linear(twin(ids), twin.embed_tokens.weight)
        theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    difference = (ours - theirs).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"the saved model's logits differ from the trained one's by {difference}")


def report(network: Network, tokenizer: Tokenizer, count: int) -> str:
    """Held-out accuracy of every skill in one line, of the weights as they would be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save(network, tokenizer, folder)
        model, text = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        scores = {skill.__name__: score(model, text, skill, count) for skill in SKILLS if skill is not stories}
    return " ".join(f"{skill}={result.accuracy:.3f}" for skill, result in scores.items())


def optimizers(network: Network, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for embedding and norms."""
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0)]


def schedule(done: float, warm_up: float = 0.015) -> float:
    """The factor of the learning rate when the part `done` of the time has passed: up, level, down to zero."""
    if done < warm_up:
        return done / warm_up
    return max(0.0, min(1.0, (1 - done) / 0.6))


def train(network: Network, tokenizer: Tokenizer, options: argparse.Namespace,
          checkpoint: Callable[[str], None]) -> None:
    """Steps until the time is over; says how it goes, and evaluates now and then."""
    optims = optimizers(network, options.muon_lr, options.adam_lr)
    rates = [optim.param_groups[0]["lr"] for optim in optims]
    start, steps, tokens, sums, count = time.monotonic(), 0, 0, 0.0, 0
    next_report, next_line = options.report_every, 0.5
    budget = options.minutes
    for ids, targets in batches(tokenizer, options.seed, options.batch_tokens):
        minutes = (time.monotonic() - start) / 60
        if minutes >= budget:
            break
        for optim, rate in zip(optims, rates, strict=True):
            optim.param_groups[0]["lr"] = rate * schedule(minutes / budget)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            loss = network.loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        steps, tokens, sums, count = steps + 1, tokens + ids.numel(), sums + loss.item(), count + 1
        if minutes >= next_line:
            print(f"{minutes:6.1f} min  step {steps}  {tokens / 1e6:.2f} M tokens  loss {sums / count:.4f}", flush=True)
            next_line, sums, count = minutes + 0.5, 0.0, 0
        if minutes >= next_report and minutes < budget - 1:
            checkpoint(f"{minutes:6.1f} min")
            next_report = minutes + options.report_every


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--resume", type=Path, help="folder of an earlier model to go on from")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer.json to keep")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--ffn", type=int, default=Shape.ffn)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--report-every", type=float, default=4.0, help="minutes between evaluations")
    parser.add_argument("--report-questions", type=int, default=60)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in the matrix products")
    return parser.parse_args()


def main() -> None:
    """Trains, saves, checks and reports."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    kept = options.resume or options.tokenizer
    tokenizer = Tokenizer.from_file(str(kept / "tokenizer.json")) if kept else new_tokenizer(Shape.vocab)
    network = Network(Shape(vocab=tokenizer.get_vocab_size(), hidden=options.hidden, layers=options.layers,
                            ffn=options.ffn))
    if options.resume:
        weights = load_file(options.resume / "model.safetensors")
        network.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {network.shape}", flush=True)

    def checkpoint(when: str) -> None:
        print(f"{when}  {report(network, tokenizer, options.report_questions)}", flush=True)

    train(network, tokenizer, options, checkpoint)
    save(network, tokenizer, options.out)
    check(network, options.out)
    print("saved", options.out, report(network, tokenizer, 200), flush=True)


if __name__ == "__main__":
    main()
