//! What a machine must offer.
