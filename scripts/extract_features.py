"""Extract CLIP image features of videos, for training or for detection.

    python scripts/extract_features.py videos/ --weights ViT-B/16 --output features/          # .npy, 5 a second
    python scripts/extract_features.py a.mp4 b.mkv --weights ViT-L-14.pt --fps 2 --output features/
    python scripts/extract_features.py videos/ --weights ViT-B/16 --stride 8 --snippet-length 16 --output features/

Videos are files, or folders searched recursively; a video's id is its file's name without the suffix. The folder gets
VIDEO.npy (snippets x width, half precision) and VIDEO.json, which records fps, duration, backbone and the SHA-256 of
the image encoder's weights; scripts/pack_features.py packs them. openai-clip downloads ViT-B/16, ViT-B/32 and ViT-L/14
with their checksum (needs torchvision); a file is OpenAI's archive or a state dict.

Finished videos are skipped, so an interrupted run is resumed by repeating it. Broken videos are named at the end with
their reason and make the exit code 1; the others are done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stale.errors import run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO|FOLDER")
    parser.add_argument("--weights", required=True, metavar="NAME|FILE", help="ViT-B/16, ViT-B/32, ViT-L/14, or a file")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=float, default=5.0, help="snippets a second, one frame each; default 5")
    rate.add_argument("--stride", type=int, metavar="FRAMES", help="a snippet every so many frames of the video")
    parser.add_argument(
        "--snippet-length", type=int, default=1, metavar="FRAMES", help="with --stride: the mean of so many frames"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="frames the image encoder is given at once")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="videos decoded at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.workers) < 1:
        parser.error("--batch-size and --workers must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    from stale.device import choose_device  # after parsing: --help answers at once
    from stale.video.extract import Sampling, extract_features
    from stale.video.frames import find_videos
    from stale.video.image_encoder import ImageEncoder

    sampling = Sampling(options.fps, options.stride, options.snippet_length)
    videos = find_videos(options.videos)
    encoder = ImageEncoder.load(options.weights, choose_device(options.device, "--device"))
    report = extract_features(
        videos, options.output, encoder, sampling, batch_size=options.batch_size, workers=options.workers
    )
    print(f"{len(report.done)} videos done, {len(report.skipped)} finished earlier, {len(report.broken)} broken")
    print(f"{options.output}: {encoder.backbone}, {encoder.width} wide, {sampling}")
    for reason in report.broken.values():
        print(f"broken: {reason}", file=sys.stderr)
    if report.broken:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
