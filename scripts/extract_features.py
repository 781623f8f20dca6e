"""Extract CLIP image features of videos, for training or for detection.

    python scripts/extract_features.py videos/ --weights ViT-B/16 --output features/          # .npy, 5 a second
    python scripts/extract_features.py a.mp4 b.mkv --weights ViT-L-14.pt --fps 2 --output features/
    python scripts/extract_features.py videos/ --weights ViT-B/16 --stride 8 --snippet-length 16 --output features/
    python scripts/extract_features.py videos/ --library open_clip --weights ViT-B-16-SigLIP2 --pretrained webli \\
        --output features/

Videos are files, or folders searched recursively; a video's id is its file's name without the suffix. The folder gets
VIDEO.npy (snippets x width, half precision) and VIDEO.json, which records fps, duration, backbone and the SHA-256 of
the image encoder's weights; scripts/pack_features.py packs them. OpenAI's models are downloaded by name and verified; a
file is OpenAI's archive, or a state dict under OpenAI's, open_clip's or Hugging Face's names (also .safetensors). Class
embeddings of the same model are made by scripts/embed_classes.py.

Finished videos are skipped, so an interrupted run is resumed by repeating it. Broken videos are named at the end with
their reason and make the exit code 1; the others are done.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stale.commands import CommandParser, add_library
from stale.errors import run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO|FOLDER", help="videos, or folders of them")
    parser.add_argument("--weights", required=True, metavar="NAME|FILE", help="model, or a file of CLIP weights")
    add_library(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of the features")
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
    if options.pretrained and options.library == "clip":
        parser.error("--pretrained goes with --library open_clip")
    if options.library == "open_clip" and (options.heads or options.activation != "auto"):
        parser.error("--activation and --heads go with --library clip")
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
    device = choose_device(options.device, "--device")
    if options.library == "open_clip":
        encoder: Any = OpenClipEncoder(options.weights, options.pretrained, device)
    else:
        encoder = ImageEncoder.load(options.weights, device, options.activation, options.heads)
    todo, broken = extract_features(
        videos, options.output, encoder, sampling, batch_size=options.batch_size, workers=options.workers
    )
    done = len(todo) - len(broken)
    print(f"{done} videos done, {len(videos) - len(todo)} finished earlier, {len(broken)} broken")
    print(f"{options.output}: {encoder.backbone}, {encoder.width} wide, {sampling}")
    for reason in broken.values():
        print(f"broken: {reason}", file=sys.stderr)
    if broken:
        raise SystemExit(1)


class OpenClipEncoder:
    """An image encoder of open_clip with its own preprocessing, as :class:`stale.video.image_encoder.ImageEncoder`."""

    def __init__(self, model: str, pretrained: str, device: Any) -> None:
        """Load ``model`` with the weights ``pretrained``, a tag of open_clip or a file."""
        import numpy as np

        from stale.video.image_encoder import load_open_clip

        network, preprocess, self.backbone = load_open_clip(model, pretrained)
        # Its last steps are ToTensor and Normalize: those before them give an image.
        self._steps, self._normalize = preprocess.transforms[:-2], preprocess.transforms[-1]
        self.device, self._model = device, network.to(device).eval()
        self.resolution = self.crop(np.zeros((8, 8, 3), np.uint8)).shape[0]
        self.width = self.encode(np.zeros((1, self.resolution, self.resolution, 3), np.uint8)).shape[1]

    def crop(self, image: Any) -> Any:
        """The part of an RGB image (H, W, 3) uint8 that is encoded: (R, R, 3) uint8."""
        import numpy as np
        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(image))
        for step in self._steps:
            picture = step(picture)
        return np.asarray(picture)

    def encode(self, images: Any) -> Any:
        """Encode images (B, R, R, 3) uint8, already cropped, as features (B, C) float32, not normalized."""
        import torch

        with torch.inference_mode():
            pixels = torch.tensor(images, device=self.device).permute(0, 3, 1, 2).float() / 255
            return self._model.encode_image(self._normalize(pixels)).float().cpu().numpy()


if __name__ == "__main__":
    run_command(main)
