"""Trains the bundled model from nothing but the exercises and stories of this folder, on the CPU.

    python deploy/bundled_model/train.py --out shared/pagebus/bundled --minutes 60

The learning rate falls to zero at the end of `--minutes`, so the figure decides how good the model gets.
`--resume` starts from an earlier model's folder and keeps its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from batches import batches
from evaluate import score_all
from exercises import draw_chat, draw_text
from network import Network, Shape, config_of, exported
from safetensors.torch import load_file, save_file
from tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, special_id, train_tokenizer
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
)


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
    end, pad = special_id(tokenizer, TURN_END), special_id(tokenizer, END_OF_TEXT)
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


def report(folder: Path, count: int) -> str:
    """Held-out accuracy of every skill in one line, of the model as saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = score_all(model, tokenizer, count)
    return " ".join(f"{skill}={result.accuracy:.3f}" for skill, result in scores.items())


class Optimizers:
    """Muon for the matrices of the layers, a share a worker; Adam for embedding and norms, everywhere."""

    def __init__(self, network: Network, options: argparse.Namespace, rank: int) -> None:
        matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
        self.shares = [matrices[worker :: options.workers] for worker in range(options.workers)]
        muon = torch.optim.Muon(self.shares[rank], lr=options.muon_lr, weight_decay=0.01, momentum=0.95)
        adam = torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.97), weight_decay=0.0)
        self.optims: list[tuple[torch.optim.Optimizer, float]]
        self.optims = [(muon, options.muon_lr), (adam, options.adam_lr)]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` of the learning rates; then every worker has all weights again."""
        for optim, rate in self.optims:
            optim.param_groups[0]["lr"] = rate * factor
            optim.step()
        for worker, share in enumerate(self.shares):
            flat = torch.cat([matrix.flatten() for matrix in share])
            dist.broadcast(flat, worker)
            for matrix, new in zip(
                share, torch.split(flat, [matrix.numel() for matrix in share]), strict=True
            ):
                matrix.copy_(new.view_as(matrix))


def schedule(done: float, level: float, warm_up: float = 0.015) -> float:
    """The factor of the learning rate when the part `done` of the time has passed."""
    if done < warm_up:
        return done / warm_up
    return max(0.0, min(1.0, (1 - done) / (1 - level)))


def average_gradients(network: Network, workers: int) -> None:
    """Gives every worker the mean of all workers' gradients, in one message."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(
        gradients, torch.split(flat / workers, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def train(network: Network, tokenizer: Tokenizer, options: argparse.Namespace, rank: int) -> None:
    """Steps until the time is over; the first worker owns the clock, and evaluates now and then."""
    optims = Optimizers(network, options, rank)
    start, steps, tokens, sums, count = time.monotonic(), 0, 0, 0.0, 0
    next_report, next_line = options.report_every, 0.5
    clock = torch.zeros(1)
    for ids, targets in batches(tokenizer, options.seed * 1000 + rank, options.batch_tokens):
        clock[0] = (time.monotonic() - start) / 60
        dist.broadcast(clock, 0)
        minutes = clock.item()
        if minutes >= options.minutes:
            break
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            loss = network.loss(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(network, options.workers)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optims.step(schedule(minutes / options.minutes, options.level))
        network.zero_grad(set_to_none=True)
        steps, tokens, sums, count = (
            steps + 1,
            tokens + ids.numel() * options.workers,
            sums + loss.item(),
            count + 1,
        )
        if rank == 0 and minutes >= next_line:
            print(
                f"{minutes:6.1f} min  step {steps}  {tokens / 1e6:.2f} M tokens  loss {sums / count:.4f}",
                flush=True,
            )
            next_line, sums, count = minutes + 0.5, 0.0, 0
        if rank == 0 and minutes >= next_report and minutes < options.minutes - 1:
            save(network, tokenizer, options.out)
            print(f"{minutes:6.1f} min  {report(options.out, options.report_questions)}", flush=True)
            next_report = minutes + options.report_every


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--resume", type=Path, help="folder of an earlier model to go on from")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer.json to keep")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=29517, help="where the workers meet on this machine")
    parser.add_argument("--level", type=float, default=0.5, help="part of the time before the rate falls")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--ffn", type=int, default=Shape.ffn)
    parser.add_argument("--batch-tokens", type=int, default=1536, help="a worker and step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--report-every", type=float, default=4.0, help="minutes between evaluations")
    parser.add_argument("--report-questions", type=int, default=60)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in the matrix products")
    return parser.parse_args()


def work(rank: int, options: argparse.Namespace) -> None:
    """One worker: a single thread, its own exercises, and the same weights as all others."""
    os.environ |= {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options.port),
    }
    dist.init_process_group("gloo", rank=rank, world_size=options.workers)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    kept = options.resume or options.tokenizer
    tokenizer = Tokenizer.from_file(str(kept / "tokenizer.json")) if kept else new_tokenizer(Shape.vocab)
    network = Network(
        Shape(vocab=tokenizer.get_vocab_size(), hidden=options.hidden, layers=options.layers, ffn=options.ffn)
    )
    if options.resume:
        weights = load_file(options.resume / "model.safetensors")
        network.load_state_dict(
            {name.removeprefix("model."): value.float() for name, value in weights.items()}
        )
    if rank == 0:
        print(
            f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {network.shape}",
            flush=True,
        )
    train(network, tokenizer, options, rank)
    if rank == 0:
        save(network, tokenizer, options.out)
        check(network, options.out)
        print("saved", options.out, report(options.out, 200), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Starts the workers: processes of one thread each share busy cores far better than threads do."""
    options = parse()
    spawn(work, args=(options,), nprocs=options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
