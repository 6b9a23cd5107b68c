"""Serving patches: the published state (snapshot), who sees which patches (routing), the sums (layer), the hooks (attach)."""
