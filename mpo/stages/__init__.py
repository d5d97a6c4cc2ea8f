"""Links to the scripts at the top of the checkout, so that an installed package has them, too."""
