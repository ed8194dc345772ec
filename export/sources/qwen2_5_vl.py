"""`qwen2_5_vl`, and `transformers/PATH_OR_ID` where the configuration is of one: the chat model with images of transformers.

Without a path it is a random network of small sizes, whose tokenizer is made here; `--model-args` takes `text_config` and
`vision_config` as transformers' `Qwen2_5_VLConfig` names them. Paper: Qwen2.5-VL Technical Report, 2025.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.manifest import Generation, Preprocessing
from export.informative import informative_chat
from export.phrases import grounding_phrases
from export.provenance import describe_source
from export.spec import TOKENIZER_FILE, ExportError, ExportRequest, LoadedChat, MissingToolError, tokenizer_artifact
from export.weights import load_weights, read_checkpoint

MODEL_TYPE = "qwen2_5_vl"
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|im_start|>", END_OF_TURN),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Pieces as Qwen2's tokenizer cuts them: contractions, words, single digits, punctuation, line ends, blanks.
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The library's default. Published processors allow 12 times as many, and the layers that look at all patches take memory with
# the square of their number.
MOST_PIXELS = 28 * 28 * 1280
_VOCABULARY = 512
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "fullatt_block_indexes": [1],
}


def load(request: ExportRequest, identifier: str) -> LoadedChat:
    """The network of `identifier`, a directory or a hub id; for the bare name of the source a random one of small sizes.

    Raises:
        ExportError: what is there is no Qwen2.5-VL with its processor, does something that the engines do not, or its weights do
            not fit.
        MissingToolError: transformers is not installed.
    """
    try:
        import transformers  # noqa: PLC0415  costs seconds, and the other sources do not need it
    except ImportError as error:
        raise MissingToolError("transformers is not installed; pip install 'vitrine[export]'.") from error
    if identifier != MODEL_TYPE:
        return load_chat(transformers, request, identifier)
    if request.weights == "pretrained":
        raise ExportError(f"{MODEL_TYPE} alone has no weights of its own; write transformers/PATH_OR_ID.")
    with TemporaryDirectory(prefix="vitrine-chat-") as directory:
        write_folder(Path(directory), **request.model_args)
        return load_chat(transformers, request, directory)


def load_chat(transformers: Any, request: ExportRequest, identifier: str) -> LoadedChat:
    """See `load`; `identifier` is a directory or a hub id."""
    if request.precision == "bf16" or request.engine == "tensorrt":
        raise ExportError("A chat model becomes engines of onnxruntime; leave --engine out and choose --precision fp32 or fp16.")
    try:
        config = transformers.AutoConfig.from_pretrained(identifier)
        processor = transformers.AutoProcessor.from_pretrained(identifier)
    except Exception as error:
        raise ExportError(
            f"{identifier!r} is no directory or model of the hub with a configuration and a processor: {error}"
        ) from error
    _check(config)
    network, report = _build(transformers, request, identifier, config)
    network.eval().requires_grad_(False)
    tokenizer = processor.tokenizer.backend_tokenizer.to_str().encode()
    return LoadedChat(
        network=network,
        processor=processor,
        preprocessing=_preprocessing(processor.image_processor),
        generation=_generation(network, processor, tokenizer),
        tokenizer=tokenizer,
        half=request.precision == "fp16",
        source=describe_source(
            request,
            "transformers",
            MODEL_TYPE,
            arguments=request.model_args,
            checkpoint=Path(identifier).name if request.weights == "pretrained" else None,
            report=report,
        ),
        weights=report,
    )


def _build(transformers: Any, request: ExportRequest, identifier: str, config: Any) -> tuple[Any, Any]:
    """The network with the weights that were asked for, and how a checkpoint was fitted to it."""
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    try:
        if request.weights == "pretrained":
            return model_class.from_pretrained(identifier, dtype=torch.float32, attn_implementation="eager"), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:
        raise ExportError(f"transformers cannot build the network of {identifier}: {error}") from error
    if request.weights == "checkpoint" and request.checkpoint is not None:
        return network, load_weights(network, read_checkpoint(request.checkpoint, network))
    informative_chat(network, request.seed)
    return network, None


def _check(config: Any) -> None:
    if config.model_type != MODEL_TYPE:
        raise ExportError(f"The configuration is of {config.model_type}, not of {MODEL_TYPE}.")
    text, vision = config.text_config, config.vision_config
    if "sliding_attention" in text.layer_types:
        raise ExportError("The decoder has layers with sliding attention, which are not exported.")
    if text.rope_parameters.get("rope_type", "default") != "default":
        raise ExportError(
            f"The decoder's rotary positions are of the kind {text.rope_parameters['rope_type']}, which is not exported."
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ExportError(f"The vision tower gives {vision.out_hidden_size} channels, the decoder takes {text.hidden_size}.")


def _preprocessing(processor: Any) -> Preprocessing:
    side = processor.patch_size * processor.merge_size
    return Preprocessing(
        height=side,
        width=side,
        policy="native",
        resize_height=side,
        resize_width=side,
        interpolation="bicubic",
        scaled_decoding=False,
        scale=processor.rescale_factor,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def _generation(network: Any, processor: Any, tokenizer: bytes) -> Generation:
    config, images = network.config, processor.image_processor
    vision, text = config.vision_config, config.text_config
    template = processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(template, str):
        raise ExportError("The processor has no single chat template, which tells how a conversation becomes a prompt.")
    ends = network.generation_config.eos_token_id
    ends = text.eos_token_id if ends is None else ends
    return Generation(
        tokenizer=tokenizer_artifact(tokenizer),
        chat_template=template,
        max_length=text.max_position_embeddings,
        vocabulary=text.vocab_size,
        image_token_id=config.image_token_id,
        end_token_ids=tuple(ends) if isinstance(ends, list) else (ends,),
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        vision_head_dim=vision.hidden_size // vision.num_heads,
        vision_rope_theta=vision.rope_parameters["rope_theta"],
        min_pixels=images.size["shortest_edge"],
        max_pixels=min(images.size["longest_edge"], MOST_PIXELS),
    )


def write_folder(directory: Path, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None) -> None:
    """The files of a network without weights, as transformers reads them: configuration, tokenizer, chat template and processor.

    `text_config` and `vision_config` replace what is said of the small sizes. A larger `vocab_size` than the tokenizer's leaves ids
    without a token.
    """
    tokenizer = train_tokenizer(grounding_phrases(), _VOCABULARY)
    write_files(directory, make_config(tokenizer, text_config or {}, vision_config or {}), tokenizer)


def make_config(tokenizer: Tokenizer, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a network that reads the ids of `tokenizer`; see `write_folder`."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = _TEXT | {"vocab_size": tokenizer.get_vocab_size()} | text_config
    vision = _VISION | {"out_hidden_size": text["hidden_size"]} | vision_config
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": text | {"eos_token_id": ids[END_OF_TURN], "bos_token_id": None, "pad_token_id": ids[END_OF_TEXT]},
        "vision_config": vision,
    }


def write_files(directory: Path, config: dict[str, Any], tokenizer: Tokenizer, most_pixels: int = MOST_PIXELS) -> None:
    """Lay out `config`, `tokenizer` and the processor's settings as transformers reads them.

    `most_pixels`: of an image as the network sees it.
    """
    images = {"image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": 56 * 56, "longest_edge": most_pixels}}
    words = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
    }
    documents = {
        "config.json": config,
        "tokenizer_config.json": words,
        "preprocessor_config.json": images | {"processor_class": "Qwen2_5_VLProcessor"},
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(directory / TOKENIZER_FILE))


def train_tokenizer(texts: list[str] | tuple[str, ...], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens in Qwen2's manner: whatever is not in `texts` becomes its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
