"""Give a tokenizer unused tokens: `python tools/pad_vocabulary.py IN.json OUT.json --vocab_size 200019`.

A small corpus then has the vocabulary of a model whose own tokenizer it was not made with, for measurements of speed
and memory. No text is ever encoded into an unused token.
"""

import argparse
import sys

from tokenizers import Tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the larger tokenizer."""
    parser = argparse.ArgumentParser(description="Add unused tokens up to a vocabulary size.")
    parser.add_argument("source", help="a tokenizer.json")
    parser.add_argument("target", help="where to write")
    parser.add_argument("--vocab_size", type=int, required=True, help="number of tokens afterwards")
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_file(options.source)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > options.vocab_size:
        sys.exit(f"error: {options.source} has {size} tokens, more than --vocab_size {options.vocab_size}")
    # Special, so that they stand for no bytes of text.
    tokenizer.add_special_tokens([f"<unused {i}>" for i in range(size, options.vocab_size)])
    tokenizer.save(options.target)


if __name__ == "__main__":
    main()
