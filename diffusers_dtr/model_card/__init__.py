"""Model cards, written from a trained model's folder."""

from .card import build_model_card, fetch_card, save_metrics, save_model_card


__all__ = ["build_model_card", "fetch_card", "save_metrics", "save_model_card"]
