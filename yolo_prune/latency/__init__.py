# SPDX-License-Identifier: AGPL-3.0-or-later
"""Latency as a function of widths: layer times are measured, added, and corrected by times of whole models."""
