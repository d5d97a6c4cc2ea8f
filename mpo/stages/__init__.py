"""The scripts of the stages, which stand at the top of the checkout: links, so that an installed package has them, too."""
