# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sparse weights: which single weights become zero. Channels are the business of `planning`."""
