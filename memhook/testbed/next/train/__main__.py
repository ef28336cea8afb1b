"""Train the second testbed model: ``python -m memhook.testbed.next.train --work DIR --out DIR``.

Every stage goes on where it was interrupted. Some four hours on one CPU core with the default number of steps.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from memhook.testbed.next.train import autoencoder, diffusion, export, reader, text


def main() -> None:
    """Run or finish all stages."""
    parser = argparse.ArgumentParser(prog="python -m memhook.testbed.next.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log.jsonl; an interrupted run goes on from it")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=4500, help="batches of 16 pictures")
    parser.add_argument("--text-steps", type=int, default=600, help="batches of 128 captions")
    parser.add_argument("--reader-steps", type=int, default=1200, help="batches of 64 pictures, for the network that names subjects and colors")
    parser.add_argument(
        "--courses", type=int, choices=range(1, len(diffusion.COURSES) + 1), default=len(diffusion.COURSES), help="courses of the denoiser"
    )
    parser.add_argument("--steps", type=int, help="batches of 32 caption-picture pairs a course (default: 3,000, 4,000 and 4,000)")
    arguments = parser.parse_args()

    device, work = torch.device(arguments.device), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    vae = autoencoder.train(work, steps=arguments.autoencoder_steps, device=device)
    tokenizer = text.train_tokenizer(work)
    encoder = text.train(work, tokenizer, steps=arguments.text_steps, device=device)
    courses = diffusion.COURSES[: arguments.courses]
    if arguments.steps is not None:
        courses = tuple(replace(course, steps=arguments.steps) for course in courses)
    unet = diffusion.train(work, vae, tokenizer, encoder, courses=courses, device=device)
    judge = reader.train(work, steps=arguments.reader_steps, device=device)
    export.export(arguments.out, vae, tokenizer, encoder, unet, judge, samples=sum(course.steps for course in courses) * diffusion.BATCH)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
