"""Random detectors, captioning models and segment-anything weights, written to disk as their libraries write them."""

from __future__ import annotations

from pathlib import Path

from .models import seeded

TEXT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "dog", "cat", "red", "a", "photo", "of", "ball"]
SIDE = 64


def bert_tokenizer(folder: Path):
    """A BERT tokenizer of TEXT."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(TEXT))
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(TEXT)})


def grounding_dino_folder(folder: Path, seed: int = 0):
    """A GroundingDinoForObjectDetection of one layer each; returns the model that was saved."""
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(TEXT), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=64, num_queries=12, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=32,
    )  # fmt: skip
    model = seeded(lambda: GroundingDinoForObjectDetection(config), seed)
    model.save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    GroundingDinoProcessor(pictures, bert_tokenizer(folder)).save_pretrained(folder)
    return model


def owl_folder(folder: Path, version: int = 2, seed: int = 0):
    """An Owlv2ForObjectDetection or OwlViTForObjectDetection; returns the model that was saved."""
    import transformers

    from .models import word_tokenizer

    name = "Owlv2" if version == 2 else "OwlViT"
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(
        text_config={**part, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 11, "bos_token_id": 10,
                     "pad_token_id": 11},
        vision_config={**part, "image_size": SIDE, "patch_size": 16}, projection_dim=32,
    )  # fmt: skip
    model = seeded(lambda: getattr(transformers, f"{name}ForObjectDetection")(config), seed)
    model.save_pretrained(folder)
    pictures = getattr(transformers, f"{name}ImageProcessor")(size={"height": SIDE, "width": SIDE})
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 16
    getattr(transformers, f"{name}Processor")(pictures, tokenizer).save_pretrained(folder)
    return model


def blip2_folder(folder: Path, seed: int = 0):
    """A Blip2ForConditionalGeneration over a random OPT; returns the model that was saved."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**shared, "image_size": 32, "patch_size": 16},
        qformer_config={**shared, "encoder_hidden_size": 16, "vocab_size": len(TEXT)},
        text_config={
            "model_type": "opt", "vocab_size": len(TEXT) + 1, "hidden_size": 16, "ffn_dim": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        },
        num_query_tokens=4, image_token_index=len(TEXT),
    )  # fmt: skip
    model = seeded(lambda: Blip2ForConditionalGeneration(config), seed)
    model.save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(pictures, bert_tokenizer(folder), num_query_tokens=4).save_pretrained(folder)
    return model


def blip_folder(folder: Path, seed: int = 0):
    """A BlipForConditionalGeneration; returns the model that was saved."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**shared, "vocab_size": len(TEXT), "encoder_hidden_size": 16, "bos_token_id": 2,
                     "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0},
        vision_config={**shared, "image_size": 32, "patch_size": 16}, projection_dim=16,
    )  # fmt: skip
    model = seeded(lambda: BlipForConditionalGeneration(config), seed)
    model.save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(pictures, bert_tokenizer(folder)).save_pretrained(folder)
    return model


def small_sam(checkpoint: str | None = None):
    """segment-anything's own classes at 64 px, with ViT-B's width: takes the place of its smallest network."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=64, depth=1, embed_dim=768, num_heads=2, use_rel_pos=True, out_chans=32, window_size=2,
        global_attn_indexes=(0,), mlp_ratio=0.1,
    )  # fmt: skip
    decoder = MaskDecoder(
        transformer_dim=32,
        transformer=TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=16, num_heads=2),
        iou_head_hidden_dim=8,
    )
    return Sam(encoder, PromptEncoder(32, (4, 4), (64, 64), mask_in_chans=4), decoder)


def sam_file(path: Path, seed: int = 0):
    """ViT-B weights of segment-anything, random; as the authors' .pth or as safetensors. Returns the network."""
    import segment_anything
    import torch
    from safetensors.torch import save_file

    sam = seeded(segment_anything.sam_model_registry["vit_b"], seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in sam.state_dict().items()}, path)
    else:
        torch.save(sam.state_dict(), path)
    return sam
