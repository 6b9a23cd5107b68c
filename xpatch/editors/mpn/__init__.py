"""MPN: Transformer-Patcher with parallel languages."""
