# SPDX-License-Identifier: AGPL-3.0-or-later
"""Planning: which channels are removed. Makes a plan from scores, and computes the cost of a model."""
