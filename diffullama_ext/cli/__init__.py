# SPDX-License-Identifier: Apache-2.0
"""The command line: thin, one file a group of commands. Nothing else in the package imports it."""
