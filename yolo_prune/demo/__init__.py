# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune demo`: the complete workflow on a small synthetic dataset."""
