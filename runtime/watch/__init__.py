"""Nothing freezes silently: ranks agree before they act, a journal says what each did, a watchdog who is to blame."""
