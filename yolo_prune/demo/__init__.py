# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune demo`: everything, on a small made-up dataset."""
