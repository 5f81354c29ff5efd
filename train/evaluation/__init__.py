"""What is measured of a model: losses at fixed noise, and figures of drawn pictures, as pure functions of arrays."""
