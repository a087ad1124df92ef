// Package gateway runs an Envoy as a supervised child: found, of the right version, started again when it ends, its
// log lines turned into ours, and gone when we are gone, also when we are killed.
//
// It is for the commands that bring their own gateway. It never downloads anything, and configures nothing but the
// bootstrap.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// Version is the Envoy that the lowering is made for. Its AI and matcher extensions change between releases.
const Version = "1.40"

var (
	// ErrNoEnvoy means that there is no Envoy where one was looked for.
	ErrNoEnvoy = errors.New("no Envoy found")
	// ErrVersion means that there is one, of another version.
	ErrVersion = errors.New("wrong Envoy version")
)

// Find returns the path of an Envoy of the right version: the one asked for, or else the first of those on PATH and
// in the folders given. A path that was asked for is never replaced by another.
func Find(ctx context.Context, asked string, folders ...string) (string, error) {
	if asked != "" {
		return asked, check(ctx, asked)
	}
	var wrong error
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), folders...) {
		path := filepath.Join(dir, "envoy")
		if info, err := os.Stat(path); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			continue
		}
		err := check(ctx, path)
		if err == nil {
			return path, nil
		}
		wrong = err
	}
	if wrong != nil {
		return "", wrong
	}
	return "", ErrNoEnvoy
}

var versionLine = regexp.MustCompile(`version: [0-9a-f]+/(([0-9]+\.[0-9]+)\.[0-9]+[^/]*)/`)

func check(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: %s does not exist", ErrNoEnvoy, path)
		}
		return fmt.Errorf("ask %s for its version: %w", path, err)
	}
	found := versionLine.FindSubmatch(out)
	if found == nil {
		return fmt.Errorf("%w: %s does not say that it is an Envoy", ErrVersion, path)
	}
	if string(found[2]) != Version {
		return fmt.Errorf("%w: %s is %s, not %s", ErrVersion, path, found[1], Version)
	}
	return nil
}
