"""RT-DETR's way from the pixels to its queries, for any batch: transformers' own counts the images with `len`, which fixes them."""

from typing import Any

import torch
from torch import Tensor, nn

from export.rewrites.base import Rewrite, is_a


class Proposing(nn.Module):
    """transformers' `RTDetrModel` as it infers, without what training adds and without padding, of which RT-DETR knows none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, **unused: Any) -> Any:
        """Normalised [B,3,H,W] -> the library's output, as far as its detector reads it."""
        model = self.model
        features = model.backbone.model(pixel_values).feature_maps
        maps = model.encoder([project(each) for project, each in zip(model.encoder_input_proj, features, strict=True)])
        maps = list(maps.last_hidden_state)
        maps += [maps[-1]] * (len(model.decoder_input_proj) - len(maps))
        sources = [project(each) for project, each in zip(model.decoder_input_proj, maps, strict=True)]
        sizes = [(source.shape[2], source.shape[3]) for source in sources]
        values = torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1)
        anchors, valid = model.generate_anchors(tuple(sizes), device=values.device, dtype=values.dtype)
        memory = model.enc_output(valid.to(values.dtype) * values)
        proposals = model.enc_score_head(memory)
        places = proposals.max(-1).values.topk(model.config.num_queries, 1).indices
        answer = model.decoder(
            inputs_embeds=self._initial(values) if model.config.learn_initial_query else _rows(memory, places),
            encoder_hidden_states=values,
            reference_points=_rows(model.enc_bbox_head(memory) + anchors, places),
            spatial_shapes=torch.tensor(sizes, device=values.device),
            spatial_shapes_list=sizes,
        )
        from transformers.models.rt_detr.modeling_rt_detr import RTDetrModelOutput  # noqa: PLC0415  it is loaded by now

        return RTDetrModelOutput(
            intermediate_logits=answer.intermediate_logits,
            intermediate_reference_points=answer.intermediate_reference_points,
            enc_outputs_class=proposals,
        )

    def _initial(self, values: Tensor) -> Tensor:
        learned: Tensor = self.model.weight_embedding.weight
        return learned.expand(values.shape[0], -1, -1)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """[B,S,C] at [B,Q] -> [B,Q,C]."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def _matches(module: Any) -> bool:
    return is_a(module, "transformers.models.rt_detr.modeling_rt_detr.RTDetrModel")


ANY_BATCH = Rewrite("rt-detr-any-batch", _matches, Proposing)
