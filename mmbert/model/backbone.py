"""`MMBertModel`: text encoder, image encoder and fusion, without heads."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.base_model import MMBertPreTrainedModel
from mmbert.model.clip_text_encoder import ClipTextEncoder
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import ImageEncoder, TextEncoder
from mmbert.model.feature_encoder import FeatureEncoder
from mmbert.model.flava_text_encoder import FlavaTextEncoder
from mmbert.model.fusion import FUSIONS, build_fusion
from mmbert.model.outputs import MMBertOutput, is_recording
from mmbert.model.patches import masked_patches
from mmbert.model.text_families import FAMILIES, FamilyTextEncoder
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens

TEXT_ENCODERS = {
    "bert": TextEncoder,
    "clip": ClipTextEncoder,
    "flava": FlavaTextEncoder,
    **dict.fromkeys(FAMILIES, FamilyTextEncoder),
}
"""Value of `text_tower` -> text encoder."""


class MMBertModel(MMBertPreTrainedModel):
    """Text encoder, image encoder, and the fusion that `config.fusion` names.

    `MMBertModel(config)` has random weights and needs no network; `mmbert.build_model` loads pretrained encoders, and
    `MMBertModel.from_pretrained` a saved model.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.text_encoder: TextEncoder | ClipTextEncoder | FamilyTextEncoder = TEXT_ENCODERS[config.text_tower](config)
        # An imported model of region features computes in Python only; whatever caches or trains has an image encoder.
        self.image_encoder: ImageEncoder = (
            ImageEncoder(config) if config.image_features is None else FeatureEncoder(config)  # pyright: ignore
        )
        for module in self.image_encoder.vit.modules():
            module._belongs_to_timm = True  # pyright: ignore[reportArgumentType]
        size = config.hidden_size
        self.text_projection = _projection(self.text_encoder.width, size, always=config.project_text)
        self.image_projection = _projection(self.image_encoder.width, size, always=config.project_image)
        config.image_hidden_size = self.image_encoder.width  # read by fusions that use layers of the encoder
        with _real_device() if config.fusion not in FUSIONS else nullcontext():
            self.fusion = build_fusion(config)
        self._fusion_takes_reads = "reads" in inspect.signature(self.fusion.forward).parameters
        self.post_init()

    @property
    def word_embeddings(self) -> Tensor:
        """Word embedding matrix, (V, text width)."""
        return self.get_input_embeddings().weight  # pyright: ignore[reportReturnType]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, which are the last tokens of an encoded image, row by row."""
        rows, columns = self.image_encoder.vit.patch_embed.grid_size
        return int(rows), int(columns)

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding layer."""
        return self.text_encoder.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding layer."""
        self.text_encoder.transformer.set_input_embeddings(value)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, D) tokens, projected to the width of the fusion."""
        layers = self.fusion.reads_text_layers
        tokens = self.text_encoder(input_ids, attention_mask, token_type_ids, layers=layers)
        return self.fusion.encode_text(tokens._replace(hidden_states=self.text_projection(tokens.hidden_states)))

    def encode_image(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tokens:
        """Encode normalised images to (B, P, D) tokens, projected to the width of the fusion.

        Args:
            pixel_values: (B, 3, S, S); with `image_features` (B, P, width) region features.
            image_mask: (B, P), 1 = real region; None = all real. For region features only.
        """
        masks = {} if image_mask is None else {"mask": image_mask}
        tokens = self.image_encoder(pixel_values, **masks, layers=self.fusion.reads_image_layers)
        return tokens._replace(hidden_states=self.image_projection(tokens.hidden_states))

    def encode_masked_image(self, pixel_values: Tensor, masked: Tensor, mask_token: Tensor) -> Tokens:
        """Encode normalised images with masked patches to (B, P, D) tokens, of which the patches are the last.

        Args:
            pixel_values: (B, 3, S, S).
            masked: (B, number of patches) bool, row by row.
            mask_token: Replaces the embeddings of masked patches, (width of the image encoder,).

        Raises:
            UsageError: The image encoder is frozen.
        """
        self.check_masking()
        # Eager, as code that was compiled without the hook that masks would run without it.
        eager: Any = torch.compiler.disable(self._encode_masked_image)
        return eager(pixel_values, masked, mask_token)

    def _encode_masked_image(self, pixel_values: Tensor, masked: Tensor, mask_token: Tensor) -> Tokens:
        with torch.compiler.set_stance("force_eager"), masked_patches(self.image_encoder.vit, masked, mask_token):
            return self.encode_image(pixel_values)

    def check_masking(self) -> None:
        """Raise where the image encoder can't learn from masked images, because it is frozen."""
        if self.image_encoder.frozen != "none":
            raise UsageError(
                f"the objective mim trains the image encoder from its first layer on, but optim.freeze_image="
                f"{self.image_encoder.frozen}: leave one of them out."
            )

    def encode_batch_images(self, batch: dict[str, Tensor], *, prefix: str = "") -> Tokens:
        """Encode the images of a batch to (B, P, D) tokens, or continue from those that an encoder cache holds.

        Args:
            batch: With `pixel_values` (B, 3, S, S), or `image_hidden_states` (B, P, W) of `encode_frozen`.
            prefix: Of the keys: "wrong_" for the wrong images of an evaluation.
        """
        states = batch.get(f"{prefix}image_hidden_states")
        if states is None:
            return self.encode_image(batch[f"{prefix}pixel_values"], batch.get(f"{prefix}image_mask"))
        depth = self.image_encoder.frozen
        assert depth != "none" and isinstance(self.image_encoder, ImageEncoder)
        tokens = self.image_encoder.continue_from(states, depth, layers=self.fusion.reads_image_layers)
        return tokens._replace(hidden_states=self.image_projection(tokens.hidden_states))

    def fuse(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """Fuse encoded texts (B, T, D) with encoded images (B, P, D); for other pairs of a batch see `Tokens.rows`.

        Args:
            text: (B, T, D).
            image: (B, P, D).
            reads: The outputs that the caller reads. The fusion need not compute the others.
        """
        reads = READ_ALL if is_recording() else reads
        return self.fusion(text, image, reads=reads) if self._fusion_takes_reads else self.fusion(text, image)

    def encode_pairs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Encode texts and images, of which one may be absent; see `forward`.

        Returns:
            Text (B, T, D) and image (B, P, D); an absent one has length 0.
        """
        if input_ids is None and pixel_values is None:
            raise UsageError(f"{type(self).__name__} got neither input_ids nor pixel_values; give at least one.")
        if input_ids is not None and pixel_values is not None and input_ids.shape[0] != pixel_values.shape[0]:
            raise UsageError(
                f"{input_ids.shape[0]} texts and {pixel_values.shape[0]} images: the batch sizes must agree."
            )
        width = self.config.hidden_size
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask, token_type_ids)
        image = None if pixel_values is None else self.encode_image(pixel_values, image_mask)
        if text is None:
            assert image is not None
            text = Tokens.absent(image.mask.shape[0], width, like=image.hidden_states)
        if image is None:
            image = Tokens.absent(text.mask.shape[0], width, like=text.hidden_states)
        return text, image

    def encode_and_fuse(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Fused:
        """Encode and fuse a batch as `forward` does, but return tokens with their masks."""
        return self.fuse(*self.encode_pairs(input_ids, attention_mask, token_type_ids, pixel_values, image_mask))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        image_mask: Tensor | None = None,
    ) -> MMBertOutput | tuple[Any, ...]:
        """Encode and fuse a batch; one modality may be absent.

        Args:
            input_ids: (B, T) int64, or None for images only.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments of the text, as BERT's; None = all 0.
            pixel_values: (B, 3, S, S) float, or None for text only.
            output_attentions: Return `attentions`. None: as the configuration says.
            output_hidden_states: Return `hidden_states`. None: as the configuration says.
            return_dict: False: a tuple of the outputs that are not None. None: as the configuration says.
            image_mask: See `encode_image`.

        Raises:
            UsageError: Both modalities absent, or batches of different size.
        """
        with self._record(output_attentions, output_hidden_states) as recorded:
            fused = self.encode_and_fuse(input_ids, attention_mask, token_type_ids, pixel_values, image_mask)
            output = MMBertOutput(
                fused.text.hidden_states, fused.image.hidden_states, fused.pooled, **recorded.outputs()
            )
        return self._returned(output, return_dict)


def _real_device() -> Any:
    """Return a context without the meta device, for constructors of custom fusions that compute with tensors."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def check_fusion_layers(model: MMBertModel) -> None:
    """Raise where the joint vector would depend on the text only."""
    minimum, given = model.fusion.min_layers, model.config.fusion_layers
    if given < minimum:
        raise UsageError(
            f"fusion_layers={given}: the joint vector of fusion='{model.config.fusion}' would not depend on the image; "
            f"it takes {minimum} or more layers."
        )


def _projection(width: int, hidden_size: int, *, always: bool) -> nn.Module:
    """Build the projection of an encoder's tokens to the width of the fusion; the identity where they are equal."""
    return nn.Identity() if width == hidden_size and not always else nn.Linear(width, hidden_size)
