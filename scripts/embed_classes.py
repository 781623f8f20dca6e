"""Embed class names by the text encoder of a vision-language model, for model.text.embeddings and inference.py.

    python scripts/embed_classes.py --annotations data/thumos14/thumos14.json --model ViT-B/16 --output classes.npz
    python scripts/embed_classes.py --classes "high jump" "golf swing | a golfer hits the ball" --model ViT-B/16 ...
    python scripts/embed_classes.py --classes-file names.txt --library open_clip --model ViT-B-16-SigLIP2 \
        --pretrained webli --template "a video of {}" "a photo of {}" --output classes.npz

A class is a name, or "name | another phrase | ..."; every phrase is put into every template, and the embeddings of a
class are averaged, each of unit length. The file holds embeddings (classes x width), the classes, and what they were
made by: library, model, SHA-256 of the text encoder's weights and the record of its image encoder, templates, phrases.
Features that are recorded to be of another image encoder are refused with it.
open_clip (pip install open_clip_torch) has SigLIP, CoCa, EVA, MobileCLIP and others.

From videos to detections of any words, with one model (here $MODEL is "--library open_clip --pretrained webli"):

    python scripts/extract_features.py videos/ $MODEL --weights ViT-B-16-SigLIP2 --output features/
    python scripts/embed_classes.py --annotations mine.json $MODEL --model ViT-B-16-SigLIP2 --output classes.npz
    python train.py --config configs/custom.yaml --set data.annotations=mine.json data.features=features/ \
        model.text.embeddings=classes.npz model.text.context_init=null --output runs/mine
    python scripts/embed_classes.py --classes "pouring tea" "opening a door" $MODEL --model ViT-B-16-SigLIP2 \
        --output words.npz
    python scripts/extract_features.py clip.mp4 $MODEL --weights ViT-B-16-SigLIP2 --output clip/
    python inference.py --run runs/mine --features clip/ --classes-embeddings words.npz
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stale.commands import CommandParser, add_library
from stale.errors import run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__)
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--classes", nargs="+", metavar="NAME", help="any class names")
    names.add_argument("--classes-file", type=Path, metavar="FILE", help="one a line, or JSON, as for inference.py")
    names.add_argument("--annotations", type=Path, metavar="FILE", help="all labels that occur")
    parser.add_argument("--model", required=True, metavar="NAME|FILE", help="of clip also a file of weights")
    add_library(parser)
    parser.add_argument(
        "--template", nargs="+", default=["a video of action {}"], metavar="TEXT", help="around a phrase"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.npz", help="the embeddings")
    options = parser.parse_args(arguments)
    if options.pretrained and options.library == "clip":
        parser.error("--pretrained goes with --library open_clip")
    if options.library == "open_clip" and (options.heads or options.activation != "auto"):
        parser.error("--activation and --heads go with --library clip")
    if options.output.suffix != ".npz":
        parser.error("--output ends in .npz")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)

    import numpy as np  # after parsing: --help answers at once

    from stale.data.annotations import all_labels, read_annotations
    from stale.data.classes import fill_template, parse_classes, read_classes
    from stale.io import atomic_path

    if options.annotations:
        classes = parse_classes(all_labels(read_annotations(options.annotations).values()))
    else:
        classes = read_classes(options.classes_file) if options.classes_file else parse_classes(options.classes)
    texts = [fill_template(item.phrases, options.template) for item in classes]
    encode, text_sha256, backbone = (open_clip_encoder if options.library == "open_clip" else clip_encoder)(options)
    embeddings = np.stack([unit(encode(group)).mean(0) for group in texts]).astype(np.float32)
    with atomic_path(options.output) as temporary:
        np.savez(
            temporary,
            embeddings=embeddings,
            classes=np.array([item.label for item in classes]),
            library=options.library,
            model=" ".join([options.model, options.pretrained]).strip(),
            text_sha256=text_sha256,
            **backbone.as_dict(),
            templates=np.array(options.template),
            phrases=np.array([" | ".join(item.phrases) for item in classes]),
        )
    print(f"{options.output}: {len(classes)} classes, {embeddings.shape[1]} wide, {options.library} {options.model}")


def unit(x: Any) -> Any:
    """Rows (n, C) as float64 of unit length."""
    import numpy as np

    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clip_encoder(options: argparse.Namespace) -> tuple[Callable[[list[str]], Any], str, Any]:
    """A function from texts to embeddings (n, C) by CLIP, the hash of its weights, and its image encoder's record."""
    import torch

    from stale.config import TextConfig
    from stale.model.clip import load_clip_weights, text_half
    from stale.model.text import TextEncoder, TextTransformer
    from stale.video.image_encoder import backbone_of, digest

    loaded = load_clip_weights(options.model, "text weights")
    transformer = TextTransformer.from_weights(text_half(loaded, options.activation), options.heads)
    backbone = backbone_of(loaded, options.activation)
    if backbone.weights_sha256 and not backbone.backbone:
        backbone = replace(backbone, backbone=Path(options.model).name)
    encoder = TextEncoder(transformer, TextConfig(prompt="template", template="{}")).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> Any:
        return encoder(encoder.tokenize(texts)).numpy()

    return encode, digest(transformer.state_dict()), backbone


def open_clip_encoder(options: argparse.Namespace) -> tuple[Callable[[list[str]], Any], str, Any]:
    """The same by open_clip, with the model's own tokenizer."""
    import torch

    from stale.video.image_encoder import digest, load_open_clip

    model, _, backbone = load_open_clip(options.model, options.pretrained)
    import open_clip

    tokenize, model = open_clip.get_tokenizer(options.model), model.eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> Any:
        return model.encode_text(tokenize(texts)).float().numpy()

    text = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("visual.")}
    return encode, digest(text), backbone


if __name__ == "__main__":
    run_command(main)
