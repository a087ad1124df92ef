package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"sallyport.dev/identity/internal/whole"
)

// readFile reads what writeFile wrote; where there is nothing, nothing.
func readFile(path string, into any) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		// Taken for empty it would revive join tokens, and agents that were revoked.
		return fmt.Errorf("%s cannot be read: %w; restore it from a backup", path, err)
	}
	return nil
}

// writeFile puts a whole file, on the disk, in the place of the one before.
func writeFile(path string, content any) error {
	data, err := json.MarshalIndent(content, "", "  ")
	if err != nil {
		return err
	}
	return whole.Write(path, data, ".new-*", os.Rename)
}
