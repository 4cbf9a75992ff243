# SPDX-License-Identifier: AGPL-3.0-or-later
"""The pruning run: what happens at each event of an Ultralytics run."""
