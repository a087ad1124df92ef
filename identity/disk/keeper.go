package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
)

const (
	// refreshHint is how often others should ask for the bundle: well within every sensible overlap.
	refreshHint = 5 * time.Minute
	// lookEvery is how soon a clock that jumps is noticed, a file of somebody else's that changes, and a disk that has
	// room again.
	lookEvery = time.Minute
)

// Config is what a keeper is made of. Durations of zero are defaults.
type Config struct {
	Dir         string
	TrustDomain spiffeid.TrustDomain
	Key         Key               // what the file is encrypted with; zero: it is not
	Upstream    UpstreamAuthority // who stands above; nil: a root of its own, kept in the folder

	SVIDTTL         time.Duration // the longest life of an X.509-SVID; an hour
	RootTTL         time.Duration // of a root of its own; ten years
	IntermediateTTL time.Duration // a week, or three times SVIDTTL; never more than a quarter of RootTTL
	JWTKeyTTL       time.Duration // 30 days
	// Overlap is for how long an authority stands in the bundle at least before it signs: a day, or a sixth of the lives
	// of roots and JWT keys, which is also the most that it may be.
	Overlap time.Duration

	// Publish is told what signs and whom to trust, at first and whenever that changes. Whoever it tells must know the
	// bundle before anything is signed. It is called from Run; nil: nobody is told.
	Publish func(identity.Authorities)
	Log     *slog.Logger // nil: none
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, otherwise time.Duration) {
		if *d == 0 {
			*d = otherwise
		}
	}
	const day = 24 * time.Hour
	set(&c.SVIDTTL, time.Hour)
	set(&c.RootTTL, 3650*day)
	set(&c.IntermediateTTL, min(max(7*day, 3*c.SVIDTTL), c.RootTTL/4))
	set(&c.JWTKeyTTL, 30*day)
	set(&c.Overlap, min(day, c.RootTTL/6, c.JWTKeyTTL/6))
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) check() error {
	switch {
	case c.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case c.SVIDTTL < identity.MinTTL:
		return fmt.Errorf("SVIDs of %s are too short-lived", c.SVIDTTL)
	case c.RootTTL < time.Minute || c.JWTKeyTTL < time.Minute:
		return fmt.Errorf("roots of %s and JWT keys of %s: at least one minute is needed", c.RootTTL, c.JWTKeyTTL)
	case c.IntermediateTTL < 10*time.Second || c.IntermediateTTL > c.RootTTL/4:
		return fmt.Errorf("intermediates of %s: more than ten seconds and at most a quarter of a root's life are needed", c.IntermediateTTL)
	case c.Overlap < time.Second || c.Overlap > c.RootTTL/6 || c.Overlap > c.JWTKeyTTL/6:
		return fmt.Errorf("an overlap of %s: more than a second and at most a sixth of the life of roots (%s) and JWT keys (%s) is needed",
			c.Overlap, c.RootTTL, c.JWTKeyTTL)
	}
	return nil
}

// Keeper has a folder for itself and keeps what is in it going. Make it with OpenKeeper, and Close it.
type Keeper struct {
	config   Config
	folder   folder
	requests chan request
	shown    atomic.Pointer[shown]

	// These are Run's, and OpenKeeper's before it.
	state     state
	dirty     bool          // what is in force is not what the file says, or not how it should say it
	exists    bool          // there is a file
	candidate *intermediate // of the upstream authority, with a root that not everybody knows yet
	jwtUntil  time.Time     // when the last JWT-SVID has ended that can have been signed by now
	idle      [2]time.Time  // from when until when there is nothing to do
}

// shown is what others see. It is immutable.
type shown struct {
	authorities identity.Authorities
	description Description
	again       time.Time // when there is something to do
}

// What of the authorities.
type What string

// What there is to rotate.
const (
	X509 What = "x509" // the root or, below an upstream authority, what stands below it
	JWT  What = "jwt"  // the key of JWT-SVIDs
	All  What = "all"
)

// request is for one rotation or, with an ID, to distrust an authority.
type request struct {
	what     What
	now      bool
	distrust string
	done     chan error // with room for the answer
}

// OpenKeeper takes a folder over, makes what is missing in it, and does what time has made necessary. Below an upstream
// authority that does not answer, it goes on with what it has. What the user must put right is returned as
// segment.Problems, which say how.
func OpenKeeper(ctx context.Context, c Config) (*Keeper, error) {
	c = c.withDefaults()
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("keep authority: %w", err)
	}
	k := &Keeper{config: c, folder: folder{dir: c.Dir, key: c.Key}, requests: make(chan request)}
	if err := k.folder.open(); err != nil {
		return nil, err
	}
	if err := k.folder.hold(); err != nil {
		return nil, err
	}
	if err := k.open(ctx, clock()); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

func (k *Keeper) open(ctx context.Context, now time.Time) error {
	s, err := k.folder.load(k.config.TrustDomain, now)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s = state{td: k.config.TrustDomain}
	case err != nil:
		return err
	default:
		k.exists = true
		k.dirty = !k.folder.sealed && !k.config.Key.IsZero()
		if err := s.begun(k.folder.path(), now); err != nil {
			return err
		}
	}
	k.state = s
	if err := k.look(ctx, now, nil); err != nil {
		if !k.state.below.usable(now) || k.dirty {
			return err
		}
		k.config.Log.Error("authority not kept up", "error", err)
	}
	return nil
}

// Close gives the folder back. Run must have ended.
func (k *Keeper) Close() error { return k.folder.close() }

// Authorities returns what signs now and whom to trust.
func (k *Keeper) Authorities() identity.Authorities { return k.shown.Load().authorities }

// Run does what is to be done when its time comes, until the context ends. What fails, it tells the log and tries
// again: what is in force stays in force until it ends by itself.
func (k *Keeper) Run(ctx context.Context) error {
	k.publish()
	for {
		wait := lookEvery
		if again := k.shown.Load().again; !again.IsZero() {
			wait = max(min(wait, again.Sub(clock())), time.Second)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case r := <-k.requests:
			if r.distrust != "" {
				r.done <- k.distrust(ctx, r.distrust, clock())
			} else {
				r.done <- k.look(ctx, clock(), &r)
			}
		case <-timer.C:
			if err := k.look(ctx, clock(), nil); err != nil && ctx.Err() == nil {
				k.config.Log.Error("authority not kept up", "error", err)
			}
		}
		timer.Stop()
	}
}

// Rotate has an authority replaced although its time has not come: the next is made at once, and signs when everybody
// has had the overlap to learn of it or, with now, at once too. Then whoever has not fetched the bundle yet refuses what
// it signs. Run must be running.
func (k *Keeper) Rotate(ctx context.Context, what What, now bool) error {
	if what != X509 && what != JWT && what != All {
		return fmt.Errorf("rotate authority: %q is none of %s, %s and %s", what, X509, JWT, All)
	}
	return k.ask(ctx, request{what: what, now: now})
}

// ask has Run do what is asked for.
func (k *Keeper) ask(ctx context.Context, r request) error {
	r.done = make(chan error, 1)
	select {
	case k.requests <- r:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clock is the time as certificates know it, which jumps when somebody sets it.
func clock() time.Time { return time.Now().UTC().Round(0) }

// look does what is to be done now, and what somebody asks for. On an error, what could be done has been, unless
// somebody asked: then nothing has.
func (k *Keeper) look(ctx context.Context, now time.Time, asked *request) error {
	k.jwtUntil = later(k.jwtUntil, now.Add(identity.MaxJWTLifetime+lookEvery))
	if asked == nil && k.config.Upstream == nil && !now.Before(k.idle[0]) && now.Before(k.idle[1]) {
		return nil
	}
	next := k.state.clone()
	jwtAgain, jwtErr := k.rotateJWT(&next, now, asked)
	if jwtErr != nil {
		next.jwt = slices.Clone(k.state.jwt)
	}
	before := next.clone()
	var again time.Time
	var err error
	if k.config.Upstream == nil {
		again, err = k.rotateOwn(&next, now, asked)
	} else {
		again, err = k.rotateUpstream(ctx, &next, now, asked)
	}
	if err != nil {
		next = before
	}
	err = errors.Join(jwtErr, err)
	if err == nil || asked == nil && next.below != nil {
		err = errors.Join(err, k.keep(next, now))
	}
	if err != nil && asked != nil {
		return err
	}
	again = soonest(now, again, jwtAgain)
	k.idle = [2]time.Time{now, again}
	if err != nil {
		k.idle[1] = now
	}
	k.show(now, again, err)
	return err
}

// keep writes a state down, and puts it in force if that succeeded.
func (k *Keeper) keep(next state, now time.Time) error {
	if !k.state.trustsAs(next) {
		next.sequence = k.state.sequence + 1
	}
	if !k.exists || k.dirty || !k.state.equal(next) {
		put := os.Rename
		if !k.exists {
			put = os.Link
		}
		if err := k.folder.write(next, put); err != nil {
			return err
		}
		k.tell(next, now)
		k.exists, k.dirty = true, false
	}
	k.state = next
	return nil
}

// show puts what is in force before others, and publishes it if it is new.
func (k *Keeper) show(now, again time.Time, err error) {
	was := k.shown.Load()
	s := &shown{description: describe(k.state, now), again: again}
	s.description.Encrypted, s.description.Upstream, s.description.Next = k.folder.sealed, k.config.Upstream != nil, again
	if err == nil {
		if err = k.state.ready(now); err != nil && (was == nil || was.description.Problem != err.Error()) {
			k.config.Log.Error("authority not ready", "error", err)
		}
	}
	if err != nil {
		s.description.Problem = err.Error()
	}
	a, err := k.state.authorities(now)
	if err != nil && was == nil {
		return // nothing has ever been in force
	}
	s.authorities = a
	same := was != nil && was.authorities.X509 == a.X509 && was.authorities.JWT == a.JWT && was.authorities.Bundle.Equal(a.Bundle)
	if same {
		s.authorities = was.authorities
	}
	k.shown.Store(s)
	if was != nil && !same {
		k.publish()
	}
}

func (k *Keeper) publish() {
	if k.config.Publish != nil {
		k.config.Publish(k.shown.Load().authorities)
	}
}
