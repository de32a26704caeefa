"""The processes around a gateway: embedded servers, tiers, and clients of models. It refuses to know routing or promotion."""
