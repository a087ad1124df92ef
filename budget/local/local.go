// Package local keeps the counters of one gateway in memory and in a file beside it.
//
// It is for the process that runs an Envoy. What a request takes is in the file before the request is answered, so that a
// process that is killed has forgotten nothing; it is on the disk within a second, so that a machine without power has forgotten
// no more than that. When the file can't be written, nothing is given.
//
// The file is a log of balances: the newest line of an account is how it stands. A line that can't be read is none.
package local

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyport.dev/budget"
)

const (
	heading     = "sallyport budgets 1\n"
	maxCounters = 100_000
	maxLine     = 4 << 10
	syncEvery   = time.Second
	// The log is written anew once it is longer than this and four times what is in it.
	longLog = 4 << 20
)

var errOther = errors.New("the file was made by something else, or by another version")

// Counters are made by Open and kept on the disk by Run. All methods may be called at any time from anywhere.
type Counters struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex
	ledger *budget.Ledger
	file   *os.File
	size   int64  // of the file
	live   int64  // of what was in it when it was written anew
	torn   bool   // the last line is not whole
	dirty  bool   // something is not on the disk yet
	beside []byte // while the log is written anew: what has been appended since; else nil
}

// Open reads the file, or makes it, readable by its owner only. now is for what is over already.
func Open(path string, now time.Time, log *slog.Logger) (*Counters, error) {
	c := &Counters{path: path, log: log, ledger: budget.NewLedger(maxCounters)}
	if err := c.read(); err != nil {
		return nil, fmt.Errorf("open budgets: %w", err)
	}
	c.ledger.Forget(now)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.rewrite(now); err != nil {
		return nil, fmt.Errorf("open budgets: %w", err)
	}
	return c, nil
}

// Reserve takes all charges, or none of them. Any error means that nothing was taken.
func (c *Counters) Reserve(_ context.Context, now time.Time, charges []budget.Charge) (budget.Answer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer, err := c.ledger.Reserve(now, charges)
	if err != nil || !answer.Allowed {
		return answer, err
	}
	if err := c.append(answer.Balances...); err != nil {
		c.ledger.Cancel(charges)
		return budget.Answer{}, fmt.Errorf("write budgets: %w", err)
	}
	return answer, nil
}

// Settle gives back what was not used, and takes what was used beyond.
func (c *Counters) Settle(_ context.Context, now time.Time, s budget.Settlement) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.ledger.Settle(now, s)
	if err != nil || b.Account == (budget.Account{}) {
		return err
	}
	if err := c.append(b); err != nil { // the next line says it, too
		return fmt.Errorf("write budgets: %w", err)
	}
	return nil
}

// Balances are how all accounts stand, in the order of their names.
func (c *Counters) Balances(_ context.Context, now time.Time) ([]budget.Balance, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return budget.Sorted(c.ledger.All(now)), nil
}

// Run puts on the disk what was written, keeps the log short, and closes it when the context ends.
func (c *Counters) Run(ctx context.Context) error {
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := c.sync(time.Now()); err != nil {
				c.log.Error("budgets can't be kept on the disk", "error", err)
			}
		case <-ctx.Done():
			c.mu.Lock()
			defer c.mu.Unlock()
			err := errors.Join(c.file.Sync(), c.file.Close())
			c.file = nil
			return err
		}
	}
}

func (c *Counters) sync(now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.size > longLog && c.size > 4*c.live {
		c.ledger.Forget(now)
		return c.rewrite(now)
	}
	if !c.dirty {
		return nil
	}
	c.dirty = false
	file := c.file
	c.mu.Unlock() // requests don't wait for the disk
	err := file.Sync()
	c.mu.Lock()
	if err != nil {
		c.dirty = true
	}
	return err
}

// append writes lines behind all others. c.mu is held.
func (c *Counters) append(balances ...budget.Balance) error {
	if c.file == nil {
		return fs.ErrClosed
	}
	var text []byte
	if c.torn {
		text = append(text, '\n')
	}
	for _, b := range balances {
		text = appendLine(text, b)
	}
	n, err := c.file.Write(text)
	c.size += int64(n)
	c.torn, c.dirty = err != nil && (c.torn || n > 0), true
	if err == nil && c.beside != nil {
		c.beside = append(c.beside, text...)
	}
	return err
}

// rewrite puts a file that has each account once in the place of the log. c.mu is held, and let go meanwhile: requests don't wait.
func (c *Counters) rewrite(now time.Time) error {
	all := slices.Collect(c.ledger.All(now.Add(-budget.Slack)))
	c.beside = []byte{}
	defer func() { c.beside = nil }()
	c.mu.Unlock()
	next, size, err := writeLog(c.path+nextSuffix, all)
	c.mu.Lock()
	if err != nil {
		return err
	}
	_, err = next.Write(c.beside)
	if err == nil {
		err = os.Rename(c.path+nextSuffix, c.path)
	}
	if err != nil {
		return errors.Join(err, next.Close())
	}
	if c.file != nil {
		_ = c.file.Close() // nobody reads it any more
	}
	c.file, c.size, c.live, c.torn, c.dirty = next, size+int64(len(c.beside)), size, false, true
	return syncFolder(filepath.Dir(c.path))
}

const nextSuffix = ".next"

// writeLog makes a log of what is there, on the disk and open for more.
func writeLog(path string, all []budget.Balance) (*os.File, int64, error) {
	text := []byte(heading)
	for _, b := range all {
		text = appendLine(text, b)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, 0, err
	}
	_, err = file.Write(text)
	if err = errors.Join(err, file.Sync()); err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, int64(len(text)), nil
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

func (c *Counters) read() error {
	file, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	unread, err := readLog(file, c.ledger.Put)
	if unread > 0 {
		c.log.Warn("lines of the budgets can't be read and count as none", "path", c.path, "lines", unread)
	}
	return err
}

// ReadFile returns how the accounts of a gateway stand by its file, for somebody else than the gateway.
func ReadFile(path string, now time.Time) ([]budget.Balance, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read budgets: %w", err)
	}
	defer file.Close()
	ledger := budget.NewLedger(maxCounters)
	if _, err := readLog(file, ledger.Put); err != nil {
		return nil, fmt.Errorf("read budgets: %w", err)
	}
	return budget.Sorted(ledger.All(now)), nil
}

// readLog passes on all balances in their order, and returns how many lines can't be read.
func readLog(from io.Reader, put func(budget.Balance)) (unread int, err error) {
	lines := bufio.NewReaderSize(from, maxLine)
	if first, err := lines.ReadString('\n'); err != nil || first != heading {
		if errors.Is(err, io.EOF) && strings.HasPrefix(heading, first) {
			return 0, nil // ended while it was made
		}
		return 0, errors.Join(err, errOther)
	}
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return unread, nil // what was being written when the process ended: nobody was told
		case errors.Is(err, bufio.ErrBufferFull):
			unread++
			continue
		case err != nil:
			return unread, err
		case len(line) == 1:
			continue
		}
		if b, ok := parseLine(line); ok {
			put(b)
		} else {
			unread++
		}
	}
}

// A line is the checksum of a JSON object, and that.
func appendLine(text []byte, b budget.Balance) []byte {
	b.Held = 0 // whoever reads it has no way to know what becomes of it
	object, err := json.Marshal(b)
	if err != nil {
		panic("encode balance: " + err.Error()) // texts, numbers and times of this century only
	}
	return append(append(fmt.Appendf(text, "%08x ", crc32.ChecksumIEEE(object)), object...), '\n')
}

func parseLine(line []byte) (b budget.Balance, ok bool) {
	sum, object, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	if !ok {
		return b, false
	}
	n, err := strconv.ParseUint(string(sum), 16, 32)
	if err != nil || uint32(n) != crc32.ChecksumIEEE(object) {
		return b, false
	}
	return b, json.Unmarshal(object, &b) == nil
}
