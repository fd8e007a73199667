"""A tokenizer for tiny vision-language models."""

from __future__ import annotations

import transformers

from .sizes import VOCABULARY

SPECIAL = [
    "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<image>", "<video>", "<IMG_CONTEXT>", "<img>", "</img>", "<fake_token_around_image>", "<global-img>",
    "<end_of_utterance>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>", "<audio_soft_token>", "<|audio_start|>", "<|audio_end|>", "<|image|>", "<|video|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image_start|>",
    "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<row_1_col_1>",
]  # fmt: skip
_FIRST = 900  # id of the first special token
ID = {token: _FIRST + number for number, token in enumerate(SPECIAL)}


def tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer whose special tokens have the ids of `ID`. Arguments are attributes that name some."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE(unk_token=None))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        ["the quick brown fox"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    filler = [f"<unused{number}>" for number in range(_FIRST - found.get_vocab_size())]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*filler, *SPECIAL)])
    found.add_tokens([AddedToken("\n" * number, normalized=False) for number in range(1, 5)])  # vLLM looks for Gemma's
    assert found.token_to_id(SPECIAL[0]) == _FIRST
    assert found.get_vocab_size() <= VOCABULARY
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        **({"extra_special_tokens": special} if special else {}),
    )
