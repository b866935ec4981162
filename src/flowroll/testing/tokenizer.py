"""Small tokenizers of the real classes, trained on the spot.

Owns the corpus and the chat template. The classes, the splitting rules and the special tokens are those of the real tokenizers;
the vocabularies are a few hundred whole English words. Qwen's and CLIP's have single bytes for everything else, so that any
text in any script can be encoded; T5's has letters, and one token for what is unknown, as the real one.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5TokenizerFast

# The sentence before every Qwen-Image prompt. Its pipeline drops the tokens of this prefix by their number, so each word of
# it has to be one token, as it is for the real tokenizer.
QWEN_IMAGE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
QWEN_IMAGE_PREFIX_TOKENS = 34

_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_SPECIAL_TOKENS = (
    _END_OF_TEXT,
    "<|im_start|>",
    _END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_PLAIN_TOKENS = ("<think>", "</think>")

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif -%}"
    "{%- endif -%}"
)

_MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
_MISTRAL_PROMPT_TOKENS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")

# A message's content is a text, or a list of parts of which some are texts.
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- set tokens = ['[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]'] if message.role == 'system' else ['[INST]', '[/INST]'] -%}"
    "{{ tokens[0] }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}"
    "{{ tokens[1] }}"
    "{%- endfor -%}"
)

_CORPUS = (
    "system",
    "user",
    "assistant",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects "
    "and background:",
    "a photo of a red apple and a green pear on a wooden table, next to a blue cup and a yellow bowl.",
    "a photo of an orange cat and a black dog above a brown sofa, below a white clock, left of a purple vase.",
    "a photo of two pink cows, three gray sheep, four brown horses and one large elephant right of a small zebra.",
    "A realistic photograph of a street at dusk, with cars, a bus, a train, a truck, a bicycle and a boat under the bridge.",
    "A close-up of a round silver ring, a square golden box, a triangle, a circle, a cube, a sphere, a cone and a star.",
    'A sign that reads "Open" in bold letters hangs over the door of an old shop in the rain, with soft warm light.',
    "An ancient stone castle on a hill, surrounded by a dark forest, a river, tall trees, mountains, clouds and the moon.",
    "A futuristic city at night with neon lights, glowing windows, flying ships and a bright sky full of stars.",
    "A cozy kitchen with a fridge, an oven, a toaster, a sink, a knife, a fork, a spoon, a bottle and a glass of water.",
    'A vintage poster with the title "Space" printed in large letters, in the style of a watercolor painting.',
    "A woman in a red dress and a man in a black hat walk with a child and an umbrella on the beach near the sea.",
    "A cake with candles, a sandwich, a pizza, a donut, a banana, a carrot and a hot dog are set on a plate.",
    "A bird, a bear, a giraffe, a frog, a fish, a butterfly and a rabbit in a garden with colorful flowers and green grass.",
    "A digital art portrait, highly detailed, sharp focus, cinematic lighting, vibrant colors, pastel tones, high contrast.",
    "a chair, a bench, a bed, a desk, a laptop, a keyboard, a mouse, a phone, a television, a book, a backpack and a suitcase.",
    'The text "Hello World" is written on a blackboard in a classroom, clearly visible, against a blurred backdrop.',
    "no blur, low quality, ugly, bad, worst, watermark, noise, text, deformed, out of frame, many, several, few, all, none.",
    "featuring displaying showing capturing holding standing sitting running looking from into with without for to at in on it "
    "its is are was be this that these those his her their between behind beside front top bottom middle center side",
)


def make_tokenizer(*sentences: str) -> Qwen2Tokenizer:
    """Makes a `Qwen2Tokenizer` that knows the corpus's words whole; the same one every time.

    Args:
        sentences: Further texts whose words it knows.
    """
    model = json.loads(_trained_on_bytes((), sentences).to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=_END_OF_TURN,
        pad_token=_END_OF_TEXT,
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _PLAIN_TOKENS])
    prefix = tokenizer(QWEN_IMAGE_PREFIX).input_ids
    assert len(prefix) == QWEN_IMAGE_PREFIX_TOKENS, f"the prompt prefix is {len(prefix)} tokens long"
    return tokenizer


def make_mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer as Mistral's, with its special tokens, that knows the corpus's words whole; the same one every time."""
    backend = _trained_on_bytes((*_MISTRAL_TOKENS, *_MISTRAL_PROMPT_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
        chat_template=_MISTRAL_TEMPLATE,
    )


def _trained_on_bytes(special_tokens: Sequence[str], sentences: Sequence[str] = ()) -> Tokenizer:
    """Trains pairs of bytes on the corpus by the splitting rules of Qwen's tokenizer; special tokens come first."""
    rules = Qwen2Tokenizer().backend_tokenizer
    draft = Tokenizer(models.BPE())
    draft.normalizer, draft.pre_tokenizer, draft.decoder = rules.normalizer, rules.pre_tokenizer, rules.decoder
    trainer = trainers.BpeTrainer(
        # More than the corpus can fill: every word is merged to the end.
        vocab_size=8192,
        min_frequency=1,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    draft.train_from_iterator([*_CORPUS, *sentences], trainer)
    return draft


def make_clip_tokenizer(*, pad_token: str = _END_OF_TEXT) -> CLIPTokenizer:
    """Makes a `CLIPTokenizer` that knows the corpus's words whole and takes 77 tokens; the same one every time.

    Args:
        pad_token: What a text is filled up with; the real tokenizers of SD3 differ in that.
    """
    suffix = "</w>"
    rules = CLIPTokenizer().backend_tokenizer
    words = [word for line in _CORPUS for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(line))]
    # The trainer is the same every time where it is given all letters, and it takes single ones alone. So a last letter, which
    # has the suffix, is trained as another letter.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lasts = {letter: chr(0xE000 + ord(letter)) for letter in alphabet}
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, initial_alphabet=[*alphabet, *lasts.values()], show_progress=False
    )
    draft.train_from_iterator([word[:-1] + lasts[word[-1]] for word in words], trainer)
    model = json.loads(draft.to_str())["model"]
    suffixed = {ord(last): letter + suffix for letter, last in lasts.items()}
    merges = [tuple(part.translate(suffixed) for part in pair) for pair in model["merges"]]
    tokens = [token.translate(suffixed) for token in sorted(model["vocab"], key=model["vocab"].__getitem__)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate([*tokens, "<|startoftext|>", _END_OF_TEXT])},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
        clean_up_tokenization_spaces=False,
    )


def make_t5_tokenizer() -> T5TokenizerFast:
    """Makes a `T5TokenizerFast` that knows the corpus's words whole, the likelier the more often they are in it."""
    words = Counter(word for text in _CORPUS for word in re.findall(r"\w+", text))
    total = words.total()
    scored = [(f"\u2581{word}", math.log(count / total)) for word, count in sorted(words.items())]
    # Unlikely enough that a word is taken whole where it can be.
    letters = [(letter, -20.0) for letter in sorted(set(string.printable) - set(string.whitespace))]
    start = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5TokenizerFast(vocab=[*start, *scored, *letters, *sentinels], model_max_length=512)
