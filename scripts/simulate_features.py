"""Make simulated features of real annotations, to rehearse a run at full size before the real features are there.

    python scripts/simulate_features.py --annotations data/activitynet/activity_net.v1-3.json --text-weights ViT-B/16
    python scripts/simulate_features.py --annotations FILE --text-weights FILE --rate 10 --output NAME_simulated

Writes a packed folder with 100 snippets a video (--snippets), or so many a second (--rate), in the joint space of the
text encoder, of all videos with a segment. Results on it show how long a run takes and whether it works, nothing about
the data set: the folder says that it is simulated, and its name must say so too. What the features are made of:
scripts/synthetic_data.
"""

from collections.abc import Sequence
from pathlib import Path

from stale.commands import CommandParser
from stale.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--annotations", required=True, metavar="FILE", help="JSON in ActivityNet's layout")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text-weights", metavar="FILE", help="or a CLIP model such as ViT-B/16")
    text.add_argument("--text-embeddings", metavar="FILE", help="class embeddings of scripts/embed_classes.py instead")
    parser.add_argument("--output", metavar="FOLDER", help="default: features_simulated beside the annotations")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--snippets", type=int, default=100, metavar="T", help="of every video; default 100")
    length.add_argument("--rate", type=float, help="snippets a second")
    options = parser.parse_args(arguments)
    if options.snippets < 1 or (options.rate is not None and not options.rate > 0):
        parser.error("--snippets and --rate must be above 0")

    from synthetic_data import simulate  # after parsing: --help answers at once

    output = options.output or Path(options.annotations).with_name("features_simulated")
    length_of = {"rate": options.rate} if options.rate else {"num_snippets": options.snippets}
    text = options.text_embeddings or options.text_weights
    simulate(options.annotations, text, output, embeddings=text == options.text_embeddings, **length_of)
    print(f"{output}: SIMULATED features")


if __name__ == "__main__":
    run_command(main)
