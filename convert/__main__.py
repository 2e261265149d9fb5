"""`python -m convert SRC DST`, installed as `jaxgen convert SRC DST`."""

import argparse
import sys

from jaxgen import CheckpointError

from . import convert_checkpoint


def main(argv: list[str] | None = None, prog: str = "python -m convert") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Converts a Hugging Face folder to jaxgen's own format.")
    parser.add_argument("src", metavar="SRC", help="folder with config.json and safetensors; only read")
    parser.add_argument("dst", metavar="DST", help="folder to make; it must not exist yet")
    arguments = parser.parse_args(argv)
    try:
        target = convert_checkpoint(arguments.src, arguments.dst)
    except (CheckpointError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {target}; load it with jaxgen.load({str(target)!r})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
