"""The two brokers behind one interface (`base.Broker`, `base.Capturer`), held together by one conformance suite."""
