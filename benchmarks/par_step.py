"""One step of progressive adaptive rounding against a plain forward and backward pass of the same block, in one run."""

import json
import statistics
import time
from pathlib import Path

import torch

from lowbit.demo import demo_model
from lowbit.grid import Affine
from lowbit.loop import Streams, begin
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._soft import SoftBlock
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe


def main() -> None:
    stream = ModelStream(demo_model())
    x = stream.embed(torch.randint(0, 4000, (16, 512)))
    block = begin(stream, 0, Recipe(Affine(2, 64)), Streams(x, x, 16), stream.block_kwargs(512)[0], 0)
    soft, job = SoftBlock(block), Reconstruction(block, 4)
    nu, v = soft.parameters()
    adam = torch.optim.Adam([{"params": nu}, {"params": v, "weight_decay": 1e-4}], lr=1e-3, fused=True)
    plain_weights = dict(block.weights)

    def plain() -> None:
        job.gradients(plain_weights, soft.keys, job.draw())

    @torch.no_grad()
    def soften() -> dict[str, torch.Tensor]:
        return soft.weights()

    def par() -> None:
        weights = soften()
        _, gradients = job.gradients(weights, soft.keys, job.draw())
        with torch.no_grad():
            soft.backward(gradients, scales=True)
        adam.step()

    times: dict[str, list[float]] = {"plain": [], "par": []}
    for turn in range(33):
        for name, step in (("plain", plain), ("par", par)):
            start = time.perf_counter()
            step()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(p / q for p, q in zip(times["par"], times["plain"], strict=True))
    result = {name: statistics.median(t) for name, t in times.items()} | {"ratio": ratio}
    print("  ".join(f"{k} {v:.4g}" for k, v in result.items()))
    Path("bench-out").mkdir(exist_ok=True)
    Path("bench-out/par_step.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
