# SPDX-License-Identifier: AGPL-3.0-or-later
"""What goes? From scores to a plan, and what it costs."""
