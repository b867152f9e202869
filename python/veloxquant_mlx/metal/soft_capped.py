"""Models that soft-cap their attention scores write the attention out, where no hook sees it. Here
each of them gets a way to our kernel, which caps too, taken where the cache is one of ours."""

import functools

from mlx_lm.models import gear, gemma2

_original_gemma2 = gemma2.Attention.__call__
_original_gear = gear._softcap_attention


def patch(attend, note, is_encoded) -> None:
    """Idempotent. attend, note, is_encoded: those of fused_sdpa."""

    @functools.wraps(_original_gemma2)
    def gemma2_attention(self, x, mask=None, cache=None):
        note(cache)
        if not getattr(cache, "fused", False):
            return _original_gemma2(self, x, mask, cache)
        n_rows, n_columns, _ = x.shape
        queries, keys, values = (
            project(x).reshape(n_rows, n_columns, -1, self.head_dim).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (self.rope(rows, offset=cache.offset) for rows in (queries, keys))
        keys, values = cache.update_and_fetch(keys, values)
        out = attend(queries, keys, values, mask, cache, scale=self.scale, logit_softcap=self.attn_logit_softcapping)
        return self.o_proj(out.swapaxes(1, 2).reshape(n_rows, n_columns, -1))

    @functools.wraps(_original_gear)
    def gear_attention(queries, keys, values, scale, softcap, mask):
        note(keys, values)
        if is_encoded(keys):
            return attend(queries, keys, values, mask, scale=scale, logit_softcap=softcap)
        return _original_gear(queries, keys, values, scale=scale, softcap=softcap, mask=mask)

    gemma2.Attention.__call__ = gemma2_attention
    gear._softcap_attention = gear_attention


def unpatch() -> None:
    gemma2.Attention.__call__ = _original_gemma2
    gear._softcap_attention = _original_gear
