"""Text and chats to token ids and back."""
