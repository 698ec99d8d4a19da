"""Parts of networks: blocks, backbones, necks and heads."""
