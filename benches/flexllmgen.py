"""FlexLLMGen's own program (flexllmgen.flex_opt, the same flags) with seeded token ids for its prompts: it would ask
the network for a tokenizer of which its benchmark needs nothing but as many ids as a prompt is long."""

import argparse
import random

from flexllmgen import flex_opt


class Tokens:
    """All that its benchmark asks of a tokenizer."""

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    def __call__(self, prompts, padding, max_length):
        draw = random.Random(7)
        self.input_ids = [[draw.randrange(4, 50000) for _ in range(max_length)] for _ in prompts]
        return self


def main():
    flex_opt.AutoTokenizer = Tokens
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    flex_opt.run_flexllmgen(parser.parse_args())


if __name__ == "__main__":
    main()
