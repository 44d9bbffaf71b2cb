"""`skipstone.route` puts depth mechanisms around the blocks of any transformers decoder, in place."""

from __future__ import annotations

from skipstone.in_place.handle import RoutedDecoder
from skipstone.in_place.route import route

__all__ = ["RoutedDecoder", "route"]
