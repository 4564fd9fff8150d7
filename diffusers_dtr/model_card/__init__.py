"""Model cards: what is known of a trained model, written into a template."""

from .card import build_model_card, fetch_card, save_metrics, save_model_card


__all__ = ["build_model_card", "fetch_card", "save_metrics", "save_model_card"]
